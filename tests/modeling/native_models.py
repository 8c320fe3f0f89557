"""A tiny model of every native MoE family, from its own config class with the common fields made small."""

import importlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


LATENT = {"num_key_value_heads": 4, "head_dim": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "mistral_large4",
        ],
        LATENT,
    ),
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "mlp_layer_types": ["sparse", "sparse"]},
    "longcat_flash": {**LATENT, "num_layers": 1, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mistral4": {**LATENT, "qk_nope_head_dim": 4},
    "deepseek_ocr2": {**LATENT, "mlp_layer_types": ["sparse", "sparse"]},
    "step3p7": {"mlp_layer_types": ["sparse", "sparse"], "sliding_window": 8},
    "dots3_note": {"num_key_value_heads": 4},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"], "layer_types": ["sliding_attention", "sliding_attention"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "moe_num_experts": 4,
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": ["full_attention", "full_attention"],
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 256,
    },
    "llama4": {"moe_layers": [0, 1], "intermediate_size_mlp": 32},
    "zaya": {"num_experts_per_tok": 1},
    "flint": {"mlp_only_layers": []},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
}
# without a class that a text model alone could be made of
BY_CLASS = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "step3p7": "Step3p7TextModel",
    "unlimited_ocr": "UnlimitedOcrTextModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "inkling": "InklingForCausalLM",
}


def tiny_native(kind: str, **overrides: Any) -> Any:
    """The causal language model of a type, or of the text model within it."""
    config = AutoConfig.for_model({"inkling": "inkling_mm_model"}.get(kind, kind))
    text = config.get_text_config()
    wanted = {**COMMON, **OWN.get(kind, {}), **overrides}
    fields = {name: value for name, value in wanted.items() if name in names_of(text)}
    small = type(text)(**fields)
    torch.manual_seed(0)
    if kind in BY_CLASS:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        return getattr(module, BY_CLASS[kind])(small).eval()
    try:
        model = AutoModelForCausalLM.from_config(small)
    except ValueError:
        model = AutoModel.from_config(small)
    return model.eval()


def names_of(config: Any) -> set[str]:
    """Names of a config's fields, aliases among them."""
    return {*type(config).__dataclass_fields__, *config.attribute_map, *vars(config)}
