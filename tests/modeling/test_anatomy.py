"""The view that all tools share must describe the layer that really runs, ours or native."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FlexOlmoConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import hf_moe
from hf_moe.testing import tiny_config

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "intermediate_size": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK = {
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 8,
}
QWEN2_MOE = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
NATIVE = {
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), 2, "softmax", True),
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8), 2, "softmax", False),
    "qwen3_moe-normalized": (
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, norm_topk_prob=True), 2, "softmax", True,
    ),
    "olmoe": (OlmoeConfig(**SIZES, num_experts=4), 2, "softmax", False),
    "qwen2_moe": (Qwen2MoeConfig(**SIZES, num_experts=4, **QWEN2_MOE), 2, "softmax", False),
    "qwen2_moe-normalized": (
        Qwen2MoeConfig(**SIZES, num_experts=4, **QWEN2_MOE, norm_topk_prob=True), 2, "softmax", True,
    ),
    "flex_olmo": (FlexOlmoConfig(**SIZES, num_experts=4), 2, "softmax", False),
    "deepseek_v3": (DeepseekV3Config(**SIZES, **MLA, **DEEPSEEK), 1, "sigmoid", True),
}  # fmt: skip
OURS = {
    "bam": (tiny_config("bam"), 2, "softmax", False),
    "rmoe": (tiny_config("rmoe"), 2, "softmax", True),
    "mole": (tiny_config("mole"), 2, "softmax", False),
    "hf_moe": (tiny_config("hf_moe"), 2, "softmax", True),
}


@pytest.mark.parametrize("case", [*NATIVE, *OURS])
@torch.no_grad()
def test_the_view_is_what_runs(case):
    config, number, scoring, normalize = {**NATIVE, **OURS}[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = list(hf_moe.moe_layers(model))
    assert len(layers) == number and [layer.name for layer in layers] == sorted(layer.name for layer in layers)
    calls = {}
    for layer in layers:
        assert layer.module is model.get_submodule(layer.name)
        assert (layer.scoring, layer.normalize, layer.transposed) == (scoring, normalize, False)
        layer.experts.register_forward_pre_hook(lambda module, args, name=layer.name: calls.update({name: args}))
    model(torch.randint(1, 32, (2, 5)))
    for layer in layers:
        tokens, indices, weights = calls[layer.name]
        assert indices.shape == weights.shape == (10, layer.top_k) and int(indices.max()) < layer.num_experts
        assert torch.allclose(weights.sum(-1).std(), torch.tensor(0.0), atol=1e-5) == normalize
        assert tokens.shape == (10, config.hidden_size)


def test_shared_experts_and_bias_of_deepseek():
    model = AutoModelForCausalLM.from_config(NATIVE["deepseek_v3"][0])
    (layer,) = hf_moe.moe_layers(model)
    assert layer.shared_experts is model.model.layers[1].mlp.shared_experts
    assert layer.selection_bias is model.model.layers[1].mlp.gate.e_score_correction_bias


def test_shared_expert_of_qwen2_moe():
    model = AutoModelForCausalLM.from_config(NATIVE["qwen2_moe"][0])
    for number, layer in enumerate(hf_moe.moe_layers(model)):
        assert layer.shared_experts is model.model.layers[number].mlp.shared_expert


def test_unknown_types_are_refused_and_dense_ones_are_empty():
    small = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    with pytest.raises(ValueError, match=r"'llama' are not known.*mixtral"):
        list(hf_moe.moe_layers(AutoModelForCausalLM.from_config(LlamaConfig(**small, intermediate_size=8))))
    dense = hf_moe.HfMoeForCausalLM(hf_moe.HfMoeConfig(**small))
    assert not list(hf_moe.moe_layers(dense))


def test_experts_without_parameters_are_counted_apart():
    experts = {"type": "swiglu", "intermediate_size": 8}
    moe = {"type": "moe", "num_experts": 4, "num_zero_experts": 2, "router": {"type": "top_k"}, "experts": experts}
    config = tiny_config("hf_moe", blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": moe}})
    layers = list(hf_moe.moe_layers(AutoModelForCausalLM.from_config(config)))
    assert [(layer.num_experts, layer.num_zero_experts) for layer in layers] == [(4, 2)] * 2
