"""Small models for tests: ours and those of people who build on the package."""

from typing import Any

from .architectures import ARCHITECTURES
from .modeling import DecoderConfig

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE_BLOCK = {
    "mixer": {"type": "attention"},
    "feed_forward": {
        "type": "moe",
        "num_experts": 4,
        "router": {"type": "top_k", "top_k": 2},
        "experts": {"type": "swiglu", "intermediate_size": 16},
    },
}
_OWN = {
    "hf_moe": {"blocks": {"moe": _MOE_BLOCK}},
    "bam": {"intermediate_size": 32, "num_experts": 3},
    "based": {
        "intermediate_size": 48,
        "feature_dim": 4,
        "sliding_window": 8,
        "linear_attention_layers": [0],
        "sliding_attention_layers": [1],
    },
    "coe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "rexmoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "layers_per_pool": 2},
    "widenet": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "rmoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_state_size": 8},
    "deepseek_moe": {
        "intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "ling": {
        "head_dim": 8,
        "intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
    },
    "moa": {"head_dim": 8, "num_attention_experts": 4, "intermediate_size": 32},
    "mole": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "latent_size": 8,
        "experts_per_group": 2,
    },
    "monet": {"moe_dim": 4, "moe_heads": 2, "moe_experts": 5, "moe_topk": 2, "moe_groups": 2},
    "moe_x": {"num_experts": 4, "moe_intermediate_size": 16},
    "smoe_dropout": {"head_dim": None, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "thor": {"intermediate_size": 16, "expert_inference": "all"},  # the same every time
    "peer": {"peer_num_keys": 4, "peer_key_size": 8, "peer_num_heads": 2, "peer_top_k": 3, "intermediate_size": 48},
    "peripheral_lm": {
        "intermediate_size": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "sigma": {"intermediate_size": 32, "num_key_heads": 1, "query_size": 48},
    "switchhead": {"num_key_value_heads": None, "head_dim": 8, "intermediate_size": 32},
    "ultramem": {
        "intermediate_size": 32,
        "memory_num_keys": 4,
        "memory_key_size": 8,
        "memory_value_size": 8,
        "memory_pre_value_size": 8,
        "memory_top_k": 2,
    },
    "dynamic_moe": {"num_experts": 4, "intermediate_size": 16},
    "moge": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_expert_groups": 2,
        "moe_intermediate_size": 16,
        "num_shared_experts": 2,
    },
    "blockffn": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def tiny_config(model_type: str, **overrides: Any) -> DecoderConfig:
    """A config of under 1M parameters for any of our architectures (2 layers, vocabulary 256).

    Args:
        model_type: a key of `hf_moe.ARCHITECTURES`.
        overrides: any field of that config.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"Unknown model_type {model_type!r}; choose from {sorted(ARCHITECTURES)}.")
    return ARCHITECTURES[model_type][0](**{**_COMMON, **_OWN.get(model_type, {}), **overrides})
