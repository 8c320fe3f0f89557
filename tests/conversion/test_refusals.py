"""Bad input: one clear error before any work, which names the field and both values, or the choices."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from dense_models import SIZES, dense_config, dense_model, dense_models, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForSequenceClassification, LlamaModel

from hf_moe import HfMoeConfig
from hf_moe.conversion import METHODS, TARGETS, Options, plan_upcycling, upcycle
from hf_moe.conversion.options import ROUTER_INITS


@contextmanager
def refused(*parts: str):
    """The block must raise a ValueError whose one line contains all parts."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def meta_models(family="llama", count=2, **overrides):
    """Models without weights: whoever reads one fails, so a refusal has to come before."""
    with torch.device("meta"):
        return [AutoModelForCausalLM.from_config(dense_config(family, **overrides)) for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {"target": "mixtrall"}, f"target='mixtrall' is unknown; choose from {list(TARGETS)}"),
        (2, {"method": "average"}, f"method='average' is unknown; choose from {list(METHODS)}"),
        (2, {"method": "btx"}, "method='btx' cannot make a 'bam'; choose from ['bam']"),
        (2, {"target": "mixtral", "method": "bam"}, "cannot make a 'mixtral'; choose from ['copy', "),
        (1, {}, "method='bam' needs at least 2 sources, got 1"),
        (1, {"target": "mixtral", "method": "btx"}, "method='btx' needs at least 2 sources, got 1"),
        (2, {"target": "mixtral", "method": "copy"}, "method='copy' takes one source, not 2"),
        (2, {"num_experts": 4}, "num_experts=4, but method='bam' makes one expert of each of 2 sources"),
        (1, {"target": "hf_moe", "num_experts": 0}, "num_experts=0 must be at least 1"),
        (2, {"top_k": 3}, "top_k=3 must be between 1 and num_experts=2"),
        (2, {"top_k": 0}, "top_k=0 must be between 1 and num_experts=2"),
        (2, {"target": "mixtral", "top_k": 1}, "leaves its router no gradient: use top_k=2"),
        (1, {"target": "mixtral", "num_experts": 4, "top_k": 5}, "top_k=5 must be between 1 and num_experts=4"),
        (2, {"router_init": "ones"}, f"router_init='ones' is unknown; choose from {list(ROUTER_INITS)}"),
        (2, {"router_std": -0.1}, "router_std=-0.1 must not be negative"),
        (2, {"dtype": "int8"}, "dtype='int8' is unknown; choose from ['float32', 'bfloat16', 'float16']"),
        (2, {"dtype": torch.int8}, "dtype='int8' is unknown"),
        (2, {"target": "mixtral", "share_key_value": True}, "share_key_value only means something to method='bam'"),
        (
            2,
            {"block_type": "serial"},
            "block_type='serial' is unknown; choose from ['pre_norm', 'parallel'",
        ),
        (2, {"block_type": "parallel"}, "block_type='parallel', but the sources have 'pre_norm' blocks"),
        (2, {"norm_topk": True}, "config overrides ['norm_topk'] are unknown; BamConfig leaves open ['"),
        (2, {"hidden_size": 64}, "config overrides ['hidden_size'] follow from the sources or from arguments"),
        (2, {"target": "hf_moe", "blocks": {}}, "config overrides ['blocks'] follow"),
        (2, {"target": "rmoe", "router_cell": "cnn"}, "cell='cnn' is unknown; choose from ['gru', 'lstm', 'rnn']"),
        (2, {"target": "mixtral", "router_aux_loss_coef": "big"}, "'router_aux_loss_coef'"),
    ],
)
def test_options(count, options, message):
    with refused(message):
        upcycle(meta_models(count=count), **options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 and 64"),
        ({"vocab_size": 99}, "vocab_size is 61 and 99"),
        ({"intermediate_size": 48}, "intermediate_size is 40 and 48"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 and 3"),
        ({"num_attention_heads": 2}, "num_attention_heads is 4 and 2; head_dim is 8 and 16"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2 and 4"),
        ({"head_dim": 16}, "head_dim is 8 and 16"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06 and 0.001"),
        ({"hidden_act": "gelu"}, "hidden_act is 'silu' and 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is False and True"),
        ({"attention_bias": True}, "attention_bias is 'none' and 'qkvo'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_parameters is {'rope_theta': 10",
        ),
        ({"family": "qwen2"}, "attention_bias is 'none' and 'qkv'"),
        ({"family": "qwen3"}, "qk_norm is 'none' and 'head'"),
        ({"family": "mistral"}, "sliding_window is None and 5"),
        ({"family": "parallel"}, "block_type is 'pre_norm' and 'parallel'"),
    ],
)
def test_sources_that_do_not_fit_together(other, message):
    sources = [*meta_models(count=1), *meta_models(count=1, **other)]
    with refused(f"source 0 (LlamaForCausalLM) and source 1 ({type(sources[1]).__name__}) do not fit", message):
        upcycle(sources, "hf_moe")


def test_a_parallel_source_keeps_its_layout():
    with refused("block_type='pre_norm', but the sources have 'parallel' blocks"):
        upcycle(meta_models("parallel"), "bam", block_type="pre_norm")
    plan = plan_upcycling(meta_models("parallel"), Options(target="bam", block_type="parallel"))
    assert plan.config.to_dict()["block_type"] == "parallel"


@pytest.mark.parametrize(
    ("family", "overrides", "target", "parts"),
    [
        (
            "qwen3",
            {},
            "mixtral",
            ("qk_norm is 'head', the target has only 'none'", "['qwen3_moe', 'bam', 'hf_moe']"),
        ),
        (
            "llama",
            {},
            "qwen3_moe",
            (
                "qk_norm is 'none', the target has only 'head'",
                "can: ['mixtral', 'qwen2_moe', 'bam', 'hf_moe', 'rmoe', 'mole']",
            ),
        ),
        (
            "qwen2",
            {},
            "mixtral",
            ("attention_bias is 'qkv', the target has only 'none'", "can: ['qwen2_moe', 'bam', 'hf_moe']"),
        ),
        ("llama", {"mlp_bias": True}, "hf_moe", ("mlp_bias is True, the target has only False", "can: []")),
        (
            "llama",
            {"attention_bias": True},
            "bam",
            ("attention_bias is 'qkvo', the target has only",),
        ),
        ("parallel", {}, "mixtral", ("block_type is 'parallel', the target has only 'pre_norm'",)),
        ("qwen2", {"head_dim": 12}, "qwen2_moe", ("head_dim is 12, the target has only hidden_size /", "= 8")),
        ("olmo2", {}, "olmoe", ("block_type is 'post_norm', the target has only 'pre_norm'", "can: ['flex_olmo',")),
        ("smollm3", {}, "mixtral", ("rotary is 'some', the target has only 'all'", "can: ['hf_moe']")),
        ("phi3", {"resid_pdrop": 0.1}, "mixtral", ("resid_pdrop is 0.1, which the target does not have", "can: []")),
        (
            "phi3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "mixtral",
            ("partial_rotary_factor is 0.5, the target has only 1.0", "can: ['hf_moe']"),
        ),
        ("youtu", {}, "mixtral", ("attention is 'latent', the target has only 'grouped'", "can: ['deepseek_v3',")),
        ("llama", {}, "deepseek_v3", ("attention is 'grouped', the target has only 'latent'",)),
        ("mistral", {}, "rmoe", ("sliding is 'all', the target has only 'none'",)),
    ],
)
def test_reasons_name_the_fact_and_the_targets_that_can(family, overrides, target, parts):
    with refused(f"{target!r} cannot express these sources", *parts):
        upcycle(meta_models(family, **overrides), target)


def test_what_cannot_be_a_source():
    good, config = meta_models(count=1)[0], dense_config("llama")
    with torch.device("meta"):
        headless, classifier = LlamaModel(config), LlamaForSequenceClassification(config)
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with refused("no sources given"):
        upcycle([])
    with refused("source 1 must be a folder, a hub id or a PreTrainedModel, not dict", "merge_and_unload()"):
        upcycle([good, {}])
    for model in (headless, classifier):
        with refused("source 1 (Llama", "has no language-model head: pass the ...ForCausalLM model"):
            upcycle([good, model])
    with refused("source 0 (GPT2", "cannot upcycle a model of type 'gpt2'; dense ones are ['llama'"):
        upcycle(gpt2, "mixtral")
    with refused("cannot upcycle a model of type 'mixtral'"):
        upcycle(upcycle(dense_model("llama"), "mixtral", num_experts=2), "mixtral")
    with refused("source 0 (Llama", "weights are offloaded or on the meta device"):
        upcycle(good, "mixtral")
    good.config.num_key_value_heads = 3
    with refused("num_attention_heads=4 is not a multiple of num_key_value_heads=3"):
        upcycle(good, "mixtral")


def test_an_hf_moe_source_must_be_dense_and_of_one_block():
    block = dense_config("hf_moe").blocks["dense"]
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    with torch.device("meta"):
        two_blocks = AutoModelForCausalLM.from_config(HfMoeConfig(blocks={"a": block, "b": block}, **sizes))
    with refused("source 0 (HfMoe", "an hf_moe source must be one block of `attention` and `mlp`"):
        upcycle(two_blocks, "hf_moe")
    with refused("source 0 (HfMoe", "an hf_moe source must be one block of `attention` and `mlp`"):
        upcycle(upcycle(dense_model("llama"), "hf_moe"), "hf_moe")


def test_a_tensor_without_a_place_is_refused():
    model = dense_model("llama")
    model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(SIZES["hidden_size"]))
    with refused("source 0 (Llama", "has no place for ['model.layers.0.self_attn.o_proj.bias']"):
        upcycle(model, "mixtral")


def test_soft_differences_warn():
    sources = [*meta_models(count=1), *meta_models(count=1, eos_token_id=3, max_position_embeddings=128)]
    with pytest.warns(UserWarning, match="in max_position_embeddings, eos_token_id; the first one's values are kept"):
        plan = plan_upcycling(sources, Options(target="mixtral"))
    fields = plan.config.to_dict()
    assert fields["max_position_embeddings"] == 64 and fields["eos_token_id"] == 2


def test_doubled_sources_warn(tmp_path):
    model = meta_models(count=1)[0]
    with pytest.warns(UserWarning, match="sources 0 and 1 are one and the same model"):
        plan_upcycling([model, model], Options())
    dense_model("llama").save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="sources 0 and 1 are one and the same model"):
        plan_upcycling([tmp_path / "a", f"{tmp_path}/../{tmp_path.name}/a"], Options())


def test_tokenizers_must_agree(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, model in zip(folders, dense_models("llama"), strict=True):
        model.save_pretrained(folder)
    save_tokenizer(folders[0], ["one", "two"])
    save_tokenizer(folders[1], ["one", "three"])
    with refused(f"the tokenizers of {folders[0]} and {folders[1]} differ: 'three' is None and 2"):
        upcycle(folders, "mixtral")
    save_tokenizer(folders[1], ["one", "two"])  # the third source has none, which is fine
    assert upcycle(folders, "mixtral").config.num_local_experts == 3
    (folders[2] / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="the tokenizer of .*c does not load and is not compared"):
        plan_upcycling(folders, Options(target="mixtral"))


def test_folders_that_are_no_models(tmp_path):
    folder = tmp_path / "model"
    with refused(f"'{folder}' is neither a local folder nor a model of the hub"):
        upcycle(str(folder), "mixtral")
    with refused("'nobody/nothing' is neither a local folder nor a model of the hub"):
        upcycle("nobody/nothing", "mixtral")
    folder.mkdir()
    with refused(f"{folder} is not a model folder: no config.json"):
        upcycle(folder, "mixtral")
    (folder / "adapter_config.json").write_text("{}")
    with refused("a PEFT adapter: merge it into its base model first"):
        upcycle(folder, "mixtral")
    model = dense_model("llama")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with refused("holds no *.safetensors, and no other weight format is read"):
        upcycle(folder, "mixtral")
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    shutil.move(folder / "pytorch_model.bin", folder / "model.safetensors")
    with refused(f"{folder}: cannot read its config: ", "no_such_type"):
        upcycle(folder, "mixtral")


@pytest.mark.allow_warnings("LOAD REPORT")
def test_damaged_checkpoints(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    state = load_file(file)
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, file, metadata={"format": "pt"})
    with refused(f"{tmp_path}: the checkpoint lacks 1 tensors, the first is 'model.layers.1.mlp.up_proj.weight'"):
        upcycle(tmp_path, "mixtral")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})
    with refused("'model.layers.1.mlp.up_proj.weight' has shape (3, 3), its config says (40, 32)"):
        upcycle(tmp_path, "mixtral")
    file.write_bytes(whole[: len(whole) // 2])
    with refused(f"{tmp_path}: cannot read its weights"):
        upcycle(tmp_path, "mixtral")


def test_quantised_sources_are_refused(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(f"{tmp_path} is quantised: use a floating-point model"):
        upcycle(tmp_path, "mixtral")
