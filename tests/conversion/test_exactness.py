"""What a mixture computes before any training (specs/conversion.md section 0), after a save and a stock reload."""

import copy

import pytest
import torch
from dense_models import dense_config, dense_model, dense_models, logits, token_ids
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
    "hf_moe": ("hf_moe", {"mixer": {"qk_norm": True, "qkv_bias": True}}),
    "hf_moe without positions": ("hf_moe", {"mixer": {"rotary": False, "output_bias": True}}),
    "parallel": ("parallel", {}),
}
EXPRESSIBLE = {
    "mixtral": ["llama", "llama, tied, wide heads, scaled rope", "mistral, sliding", "mistral, full"],
    "qwen3_moe": ["qwen3", "qwen3 with biases, sliding"],
    "hf_moe": list(SOURCES),
    "rmoe": ["llama", "llama, tied, wide heads, scaled rope", "mistral, full"],
    "bam": [
        "llama",
        "llama, tied, wide heads, scaled rope",
        "mistral, sliding",
        "mistral, full",
        "qwen2",
        "qwen3",
        "hf_moe",
        "parallel",
    ],
}
PAIRS = [(source, target) for target, sources in EXPRESSIBLE.items() for source in sources]
MOE_PAIRS = [pair for pair in PAIRS if pair[1] != "bam"]


def reload(mixture, folder):
    return AutoModelForCausalLM.from_pretrained(save_upcycled(mixture, folder))


def test_the_table_of_what_targets_express():
    """`EXPRESSIBLE` above and the code agree on every pair of source and target."""
    for source, (family, overrides) in SOURCES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(dense_config(family, **overrides))
        for target in TARGETS:
            sources = [model, copy.deepcopy(model)]
            if source in EXPRESSIBLE[target]:
                assert plan_upcycling(sources, Options(target=target)).config.model_type == target
                continue
            with pytest.raises(ValueError, match=rf"'{target}' cannot express these sources.*Targets that can"):
                upcycle(sources, target)


@pytest.mark.parametrize(("source", "target"), MOE_PAIRS)
def test_copies_compute_what_the_source_computes(source, target, tmp_path):
    family, overrides = SOURCES[source]
    model = dense_model(family, **overrides)
    mixture = reload(upcycle(model, target, num_experts=4, router_std=0.5), tmp_path / "out")
    assert mixture.config.model_type == target
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:sources .* are one and the same model")
@pytest.mark.parametrize(("source", "target"), MOE_PAIRS)
def test_btx_of_equal_models_computes_what_they_compute(source, target, tmp_path):
    family, overrides = SOURCES[source]
    model = dense_model(family, **overrides)
    mixture = reload(upcycle([model] * 3, target, router_std=0.5), tmp_path / "out")
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:sources .* are one and the same model")
@pytest.mark.parametrize("share_key_value", [False, True])
@pytest.mark.parametrize("source", EXPRESSIBLE["bam"])
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


def test_btx_step_zero_is_not_exact_for_different_models():
    models = dense_models("llama")
    mixture = logits(upcycle(models, "mixtral"))
    assert all((mixture - logits(model)).abs().max() > 0.1 for model in models)


@pytest.mark.parametrize(("source", "target"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_native_files_have_the_names_that_the_stock_class_writes(source, target, tmp_path):
    mixture = upcycle(dense_model(source), target, num_experts=2)
    TARGETS[target].model_class(mixture.config).save_pretrained(tmp_path / "stock")
    save_upcycled(mixture, tmp_path / "ours")
    shapes = []
    for folder in ("stock", "ours"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]


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
