"""What a mixture computes before any training (specs/conversion.md section 0), after a save and a stock reload."""

import copy

import pytest
import torch
from dense_models import dense_config, dense_model, dense_models, logits, token_ids
from exact_methods import EXACT_METHODS, exact_cases
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe.conversion import TARGETS, Options, plan_upcycling, save_upcycled, upcycle

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
PHI_WARNS = "to determine a scaling factor"  # its own configs do; what we make of them does not
FLAT_LATENT = {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True, "rope_interleave": False}
SOURCES = {
    "llama": ("llama", {}),
    "llama, tied, wide heads, scaled rope": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama with biases": ("llama", {"attention_bias": True}),
    "mistral, sliding": ("mistral", {}),
    "mistral, full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, one layer sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases, sliding": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 with biases, tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "smollm3, sliding": ("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
    "smollm3, all rotating": ("smollm3", {"no_rope_layers": [1, 1], "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3, long, sliding": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, "sliding_window": 6},
    ),
    "phi3, half rotated": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "youtu": ("youtu", {}),
    "youtu with biases": ("youtu", FLAT_LATENT),
    "deepseek_v3, scaled rope": ("deepseek_v3", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
    "hf_moe": ("hf_moe", {"mixer": {"qk_norm": True, "qkv_bias": True}}),
    "hf_moe, olmoe's layout": ("hf_moe", {"mixer": {"qk_norm": "full"}}),
    "hf_moe without positions": ("hf_moe", {"mixer": {"rotary": False, "output_bias": True}}),
    "parallel": ("parallel", {}),
}
PLAIN = ["llama", "mistral, full", "smollm3, all rotating", "phi3"]  # what every pre-norm target has room for
WIDE = "llama, tied, wide heads, scaled rope"
WINDOWS = ["mistral, sliding", "phi3, long, sliding"]
EXPRESSIBLE = {
    "mixtral": [*PLAIN, WIDE, *WINDOWS],
    "qwen2_moe": [*PLAIN, *WINDOWS, "qwen2", "qwen2, one layer sliding"],
    "qwen3_moe": ["qwen3", "qwen3 with biases, sliding"],
    "olmoe": ["hf_moe, olmoe's layout"],
    "flex_olmo": ["olmo2", "olmo2 with biases, tied"],
    "deepseek_v3": ["youtu", "youtu with biases", "deepseek_v3, scaled rope"],
    "hf_moe": [source for source in SOURCES if source != "youtu with biases"],
    "rmoe": [*PLAIN, WIDE],
    "mole": [*PLAIN, WIDE],
    "bam": [*PLAIN, WIDE, *WINDOWS, "qwen2", "qwen3", "hf_moe", "parallel"],
}
NATIVE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v3")  # see test_native_files.py
OURS = [(source, target) for target in ("hf_moe", "rmoe", "mole") for source in EXPRESSIBLE[target]]
BTX_PAIRS = [
    ("llama", "mixtral"),
    ("qwen3 with biases, sliding", "qwen3_moe"),
    ("hf_moe, olmoe's layout", "olmoe"),
    ("olmo2 with biases, tied", "flex_olmo"),
    ("smollm3, sliding", "hf_moe"),
    ("parallel", "hf_moe"),
    ("llama", "rmoe"),
    ("phi3", "mole"),
]


def reload(mixture, folder):
    return AutoModelForCausalLM.from_pretrained(save_upcycled(mixture, folder))


@pytest.mark.allow_warnings(PHI_WARNS)
def test_the_table_of_what_targets_express():
    """`EXPRESSIBLE` above and the code agree on every pair of source and target."""
    for source, (family, overrides) in SOURCES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(dense_config(family, **overrides))
        for target in TARGETS:
            sources = [model, copy.deepcopy(model)] if target == "bam" else model
            if source in EXPRESSIBLE[target]:
                assert plan_upcycling(sources, Options(target=target)).config.model_type == target
                continue
            with pytest.raises(ValueError, match=rf"'{target}' cannot express these sources.*Targets that can"):
                upcycle(sources, target)


@pytest.mark.allow_warnings(PHI_WARNS)
@pytest.mark.parametrize(("source", "target", "method"), exact_cases(OURS))
def test_what_is_promised_to_be_exact_is(source, target, method, tmp_path):
    """For native targets, test_native_files.py does this without our package."""
    family, overrides = SOURCES[source]
    model = dense_model(family, **overrides)
    mixture = reload(upcycle(model, target, router_std=0.5, **EXACT_METHODS[method].options), tmp_path / "out")
    assert mixture.config.model_type == target
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:sources .* are one and the same model")
@pytest.mark.parametrize(("source", "target"), BTX_PAIRS)
def test_btx_of_equal_models_computes_what_they_compute(source, target, tmp_path):
    family, overrides = SOURCES[source]
    model = dense_model(family, **overrides)
    mixture = reload(upcycle([model] * 3, target, router_std=0.5), tmp_path / "out")
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:sources .* are one and the same model")
@pytest.mark.parametrize("share_key_value", [False, True])
@pytest.mark.parametrize("source", ["llama", WIDE, "mistral, sliding", "qwen2", "qwen3", "hf_moe", "parallel"])
def test_bam_of_equal_models(source, share_key_value, tmp_path):
    """Attention gates sum to 1, so attention is exact for any router. The feed-forward is multiplied by the chosen
    probability: with zero routers that is 1/N, and the mixture equals the dense model with its down-projections
    divided by N. With renormalised gates it equals the dense model itself."""
    family, overrides = SOURCES[source]
    model, count = dense_model(family, **overrides), 3
    options = {"share_key_value": share_key_value, "router_std": 0.5}
    exact = reload(upcycle([model] * count, "bam", normalize=True, **options), tmp_path / "renormalised")
    torch.testing.assert_close(logits(exact), logits(model), atol=1e-5, rtol=0)
    every = upcycle([model] * count, "bam", top_k=count, **options)  # all probabilities together are 1
    torch.testing.assert_close(logits(every), logits(model), atol=1e-5, rtol=0)
    papers = reload(upcycle([model] * count, "bam", router_init="zero", **options), tmp_path / "paper")
    divided = copy.deepcopy(model)
    for layer in divided.model.layers:
        layer.mlp.down_proj.weight.data /= count
    torch.testing.assert_close(logits(papers), logits(divided), atol=1e-5, rtol=0)
    assert (logits(papers) - logits(model)).abs().max() > 1e-2


def force_expert(mixture: nn.Module, expert: int) -> None:
    """Make every router of a BAM model choose one expert with weight 1."""

    def soft(module, args, routing):
        weights = torch.zeros_like(routing.weights)
        weights[..., expert] = 1
        return routing._replace(weights=weights)

    def top_1(module, args, routing):
        indices = torch.full_like(routing.indices, expert)
        return routing._replace(weights=torch.ones_like(routing.weights), indices=indices)

    for layer in mixture.model.layers:
        layer.self_attn.gate.register_forward_hook(soft)
        layer.mlp.gate.register_forward_hook(top_1)


@torch.no_grad()
def share(models, kinds):
    """Give all models the first one's tensors of these kinds, so that averaging them changes nothing."""
    first = dict(models[0].named_parameters())
    for model in models[1:]:
        for name, parameter in model.named_parameters():
            if any(kind in name for kind in kinds):
                parameter.copy_(first[name])


@pytest.mark.parametrize("share_key_value", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "parallel"])
def test_bam_routed_to_one_expert_is_that_source(family, share_key_value):
    """Each expert's query heads must read its own key heads (four over two here), in every source's own order."""
    models = dense_models(family)
    share(models, ["embed", "layernorm", "model.norm", "lm_head"])
    if share_key_value:
        share(models, ["k_proj", "v_proj", "k_norm"])
    for expert, model in enumerate(models):
        mixture = upcycle(models, "bam", share_key_value=share_key_value)
        force_expert(mixture, expert)
        torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("source", "target", "layers", "sparse"),
    [
        ("qwen2", "qwen2_moe", "every-2", [1, 3]),
        ("qwen3", "qwen3_moe", "every-2", [1, 3]),
        ("youtu", "deepseek_v3", "last-half", [2, 3]),
        ("olmo2", "hf_moe", "first-half", [0, 1]),
        ("smollm3", "hf_moe", [0, 2, 3], [0, 2, 3]),
    ],
)
def test_the_other_layers_stay_dense(source, target, layers, sparse):
    family, overrides = SOURCES[source]
    model = dense_model(family, num_hidden_layers=4, **overrides)
    mixture = upcycle(model, target, layers=layers, num_experts=2)
    routed = [number for number, layer in enumerate(mixture.model.layers) if hasattr(layer.mlp, "gate")]
    assert routed == sparse
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_that_are_scaled_in_the_end(normalize):
    """The factor goes out of the down projections again: with r, gates add up to r, or to r k / 2 if all are 1/2."""
    model = dense_model("youtu")
    options = {"num_experts": 4, "top_k": 3, "normalize": normalize, "router_init": "zero"}
    mixture = upcycle(model, "deepseek_v3", routed_scaling_factor=2.5, **options)
    assert mixture.config.routed_scaling_factor == 2.5
    mass = 2.5 if normalize else 2.5 * 3 / 2
    down = model.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(mixture.model.layers[0].mlp.experts.down_proj[1], down / 2 / mass)  # half is shared
    torch.testing.assert_close(mixture.model.layers[0].mlp.shared_experts.down_proj.weight, down / 2)
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


def test_the_gate_before_a_shared_expert_is_a_half():
    """Qwen2-MoE: sigmoid(0 x) = 1/2, made up for in the down projection; and it can learn from there."""
    model = dense_model("qwen2")
    mixture = upcycle(model, "qwen2_moe", num_experts=2)
    mlp = mixture.model.layers[0].mlp
    assert not mlp.shared_expert_gate.weight.any()
    torch.testing.assert_close(mlp.shared_expert.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)
    mixture.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert mlp.shared_expert_gate.weight.grad.any()


def test_btx_step_zero_is_not_exact_for_different_models():
    models = dense_models("llama")
    mixture = logits(upcycle(models, "mixtral"))
    assert all((mixture - logits(model)).abs().max() > 0.1 for model in models)


@pytest.mark.parametrize("target", ["hf_moe", "bam", "rmoe"])
def test_our_files_have_one_tensor_per_expert(target, tmp_path):
    save_upcycled(upcycle(dense_models("llama", 2), target), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.1.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.parametrize("target", ["mixtral", "bam", "hf_moe"])
def test_a_mixture_trains_and_generates(target):
    mixture = upcycle(dense_models("llama", 2), target).train()
    mixture(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    generated = mixture.eval().generate(token_ids(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 4
