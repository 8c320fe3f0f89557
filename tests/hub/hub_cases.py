"""The models that the hub tests go through: every architecture, and several compositions of the free one."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_moe
from hf_moe.modeling import DecoderConfig
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
import specs

ATTENTION = {"type": "attention"}
DENSE = {"type": "parallel", "mixer": ATTENTION, "feed_forward": {"type": "mlp", "intermediate_size": 48}}
SHARED_EXPERT = {
    "mixer": {"type": "attention", "qk_norm": True, "sliding": True},
    "feed_forward": {
        "type": "moe",
        "num_experts": 4,
        "router": {"type": "top_k", "top_k": 2, "scoring": "softmax_selected"},
        "experts": {"type": "swiglu", "intermediate_size": 16},
        "shared_intermediate_size": 24,
        "shared_gate": True,
    },
}
RECURRENT = {
    "mixer": {"type": "soft_mixture_of_attention", "num_experts": 2, "share_key_value": True},
    "feed_forward": {
        "type": "moe",
        "num_experts": 4,
        "router": {"type": "recurrent", "top_k": 2, "state_size": 8},
        "experts": {"type": "latent", "intermediate_size": 16, "latent_size": 8, "experts_per_group": 2},
    },
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (model type, overrides of the tiny config)
    "hf_moe": ("hf_moe", {}),
    "hf_moe_dense": ("hf_moe", {"blocks": {"dense": DENSE}, "tie_word_embeddings": True}),
    "hf_moe_mixed": (
        "hf_moe",
        {
            "blocks": {"dense": DENSE, "shared": SHARED_EXPERT, "recurrent": RECURRENT},
            "block_pattern": ["dense", "shared", "recurrent"],
            "num_hidden_layers": 3,
            "sliding_window": 8,
        },
    ),
    "hf_moe_every_mixer": (
        "hf_moe",
        {
            "blocks": {name: {"type": "mixer_only", "mixer": mixer} for name, mixer in specs.MIXERS.items()},
            "num_hidden_layers": len(specs.MIXERS),
        },
    ),
    "hf_moe_every_router": (
        "hf_moe",
        {
            "blocks": {
                router: {"mixer": ATTENTION, "feed_forward": specs.moe(router)}
                for router in specs.ROUTERS
                if router != "recurrent"  # one kind of state per model, and this is in the case before
            },
            "num_hidden_layers": len(specs.ROUTERS) - 1,
        },
    ),
    "bam": ("bam", {}),
    "bam_shared": ("bam", {"block_type": "pre_norm", "share_key_value": True, "qk_norm": True, "qkv_bias": True}),
    "based": ("based", {"num_hidden_layers": 3}),
    "blockffn": ("blockffn", {}),
    "coe": ("coe", {}),
    "coe_paper": ("coe", {"placement": "paper"}),
    "deepseek_moe": ("deepseek_moe", {}),
    "dynamic_moe": ("dynamic_moe", {}),
    "ling": ("ling", {"num_hidden_layers": 3}),
    "ling_released": ("ling", {"num_nextn_predict_layers": 0}),
    "hf_moe_shortcut": (
        "hf_moe",
        {
            "blocks": {"shortcut": {**DENSE, **SHARED_EXPERT, "type": "shortcut_moe", "dense": DENSE["feed_forward"]}},
            "num_hidden_layers": 4,
            "sliding_window": 8,
        },
    ),
    "hf_moe_capped": (
        "hf_moe",
        {
            "blocks": {
                "local": {
                    "type": "sandwich",
                    "mixer": {**ATTENTION, "sliding": True, "rope_parameters": specs.LOCAL_ROPE},
                    "feed_forward": specs.MLP,
                },
                "global": {
                    "type": "post_norm",
                    "mixer": {**ATTENTION, "qk_norm": "full", "logit_softcapping": 1.0},
                    "feed_forward": specs.moe(),
                },
            },
            "final_logit_softcapping": 3.0,
            "sliding_window": 8,
        },
    ),
    "moa": ("moa", {}),
    "rexmoe": ("rexmoe", {}),
    "rmoe": ("rmoe", {}),
    "mole": ("mole", {}),
    "mole_factorized": ("mole", {"factorize_down": True}),
    "moe_x": ("moe_x", {}),
    "moge": ("moge", {}),
    "moge_scaled": ("moge", {"learned_router_scale": True}),
    "monet": ("monet", {}),
    "monet_horizontal": ("monet", {"moe_decompose": "horizontal", "num_hidden_layers": 3}),
    "peer": ("peer", {}),
    "peripheral_lm": ("peripheral_lm", {}),
    "sigma": ("sigma", {}),
    "sigma_selective": ("sigma", {"top_values": 4, "key_head_dim": 4}),
    "smoe_dropout": ("smoe_dropout", {}),
    "switchhead": ("switchhead", {}),
    "ultramem": ("ultramem", {}),
    "ultramem_delayed": (
        "ultramem",
        {
            "num_hidden_layers": 3,
            "memory_layers": [0],
            "memory_output_layers": [2],
            "memory_share_ratio": None,
            "memory_key_expansion": 2,
            "memory_separate_projections": True,
        },
    ),
    "thor": ("thor", {}),
    "widenet": ("widenet", {}),
}


def tiny(case: str) -> DecoderConfig:
    """The config of a case."""
    model_type, overrides = CASES[case]
    return tiny_config(model_type, **overrides)


def tiny_model(case: str) -> PreTrainedModel:
    """The model of a case, with weights that the name of the case decides."""
    config = tiny(case)
    torch.manual_seed(list(CASES).index(case))
    return hf_moe.ARCHITECTURES[config.model_type][2](config).eval()


def token_ids() -> torch.Tensor:
    """One batch that every case reads."""
    return torch.arange(3, 35).view(2, 16)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says to `token_ids`."""
    return model(input_ids=token_ids()).logits
