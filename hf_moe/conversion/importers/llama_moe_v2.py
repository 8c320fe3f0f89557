"""LLaMA-MoE v2 (https://arxiv.org/abs/2411.15708), published under Mixtral's type: LLaMA-MoE-v2/LLaMA-MoE-v2-*.

Transformers' Mixtral would ignore the factor of the experts, their sum with a residual expert and dense first and last
layers. Fields, names and formulas are those of `smoe/models/mixtral` in OpenSparseLLMs/LLaMA-MoE-v2.
"""

import re
from typing import Any

from ...architectures import HfMoeConfig
from .base import Imported, Importer, Made, Raw, common_fields, require

NAME = "LLaMA-MoE-v2"
OWN_FIELDS = ("scale_factor", "intermediate_size_residual", "num_moe_contract_layers", "use_attn_moe")
SUPPORTED = {"use_attn_moe": False, "add_rescale_bias": False, "moe_type": "modulelist", "rope_scaling": None}
MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def recognises(raw: Raw) -> bool:
    """Mixtral's type with fields that Mixtral does not have."""
    return raw.get("model_type") == "mixtral" and any(field in raw for field in OWN_FIELDS)


def read(raw: Raw) -> Imported:
    """Config and tensors of a LLaMA-MoE v2 checkpoint with a mixture of feed-forwards."""
    require(raw, NAME, SUPPORTED)
    sizes = common_fields({"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, **raw})
    window = raw.get("sliding_window")
    blocks = {name: block_of(raw, sparse=name == "sparse", sliding=window is not None) for name in ("dense", "sparse")}
    dense, depth = raw.get("num_moe_contract_layers", 0), raw["num_hidden_layers"]
    pattern = ["dense" if not dense <= layer < depth - dense else "sparse" for layer in range(depth)]
    config = HfMoeConfig(
        **sizes,
        sliding_window=window,
        router_aux_loss_coef=raw.get("router_aux_loss_coef", 0.001),
        blocks={name: blocks[name] for name in dict.fromkeys(pattern)},
        block_pattern=pattern if dense else ["sparse"],
    )
    return Imported(config, lambda name: Made(published_name(name)))


def block_of(raw: Raw, sparse: bool, sliding: bool) -> dict[str, Any]:
    """A mixture whose weights are renormalised and then multiplied, beside the residual expert; or one wide expert."""
    width, experts = raw["intermediate_size"], raw["num_local_experts"]
    router = {"type": "top_k", "top_k": raw.get("num_experts_per_tok", 2), "normalize": True}
    mixture = {
        "type": "moe",
        "num_experts": experts,
        "router": {**router, "scale": float(raw.get("scale_factor", 1.0))},
        "experts": {"type": "swiglu", "intermediate_size": width},
        "shared_intermediate_size": raw.get("intermediate_size_residual") or 0,
    }
    feed_forward = mixture if sparse else {"type": "mlp", "intermediate_size": width * experts}
    return {"type": "pre_norm", "mixer": {"type": "attention", "sliding": sliding}, "feed_forward": feed_forward}


def published_name(name: str) -> str:
    """Our name of a tensor as their files have it."""
    name = re.sub(r"(gate|up|down)_proj", lambda found: MATRICES[found[0]], name) if ".mlp." in name else name
    return name.replace(".mlp.shared_expert.", ".mlp_residual.").replace(".mlp.", ".block_sparse_moe.")


LLAMA_MOE_V2 = Importer(NAME, recognises, read)
