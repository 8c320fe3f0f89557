"""Targets that Transformers has itself, so that vLLM, llama.cpp, SGLang and PEFT know the result."""

from typing import Any

from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ..dense import Dense
from .base import Layout, Target


def _mixtral(dense: Dense, layout: Layout) -> dict[str, Any]:
    return {
        "intermediate_size": layout.expert_width,
        "sliding_window": dense.sliding_window,
        "num_local_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
    }


def _qwen3_moe(dense: Dense, layout: Layout) -> dict[str, Any]:
    return {
        "attention_bias": dense.attention_bias == "qkvo",
        "use_sliding_window": dense.sliding_window is not None,
        "sliding_window": dense.sliding_window,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": layout.expert_width,
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "norm_topk_prob": layout.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(dense.num_layers) if layer not in layout.layers],
    }


NATIVE_TARGETS: dict[str, Target] = {
    "mixtral": Target(
        config_class=MixtralConfig,
        model_class=MixtralForCausalLM,
        configure=_mixtral,
        expresses={"sliding": ("none", "all")},
        always_normalizes=True,
        moe="block_sparse_moe",
        experts=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Target(
        config_class=Qwen3MoeConfig,
        model_class=Qwen3MoeForCausalLM,
        configure=_qwen3_moe,
        expresses={"sliding": ("none", "all"), "qk_norm": ("head",), "attention_bias": ("none", "qkvo")},
        dense_layers="any",
    ),
}
