"""BlockFFN (https://arxiv.org/abs/2507.08771), published under MiniCPM's type: SparseLLM/BlockFFN-*.

MiniCPM multiplies three things by constants, which are folded into the weights here: embeddings by `scale_emb`, what a
sublayer adds by `scale_depth / sqrt(layers)`, hidden states before the head by `dim_model_base / hidden_size`. Sizes,
names and formulas are those of `pretrain/bmt_to_hf/modeling_minicpm.py` in thunlp/BlockFFN.
"""

import math
import re
from typing import Any

import torch

from ...architectures import BlockFfnConfig, HfMoeConfig
from ...modeling import DecoderConfig
from .base import Imported, Importer, Made, Raw, common_fields, require, scaled

SUPPORTED = {"router_act": "relu", "norm_after_router": "rms", "attention_bias": False, "pretraining_tp": 1}
SUPPORTED |= {"rope_scaling": None, "block_implementation": "torch", "num_shared_experts": 0}
KERNELS = {"kernel", "torch"}  # two ways to compute the same from the same weights
# the defaults of the published config class
LATENT_WIDTHS = {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
RENAMED = {"mlp.gate.weight": "mlp.router_proj.weight", "mlp.gate.norm_weight": "mlp.router_norm.weight"}


def recognises(raw: Raw) -> bool:
    """MiniCPM's type with blocks for feed-forwards."""
    return raw.get("model_type") == "minicpm" and raw.get("ffn_type") in ("block", "block_linear")


def read(raw: Raw) -> Imported:
    """Config and tensors of a BlockFFN checkpoint."""
    implementation = raw.get("block_implementation", "torch")
    require({**raw, "block_implementation": "torch" if implementation in KERNELS else implementation}, NAME, SUPPORTED)
    if raw.get("norm_after_router") is None:
        raise ValueError(f"{NAME}: config.json does not say norm_after_router; the released models have 'rms'.")
    embedded = raw.get("scale_emb", 1)
    added = raw.get("scale_depth", 1) / math.sqrt(raw["num_hidden_layers"])
    head = raw.get("dim_model_base", 1) / raw["hidden_size"]
    experts, width, hidden = raw["num_experts"], raw["expert_size"], raw["hidden_size"]
    flat, tied = raw["ffn_type"] == "block_linear", raw.get("tie_word_embeddings", True)

    def down(tensor: torch.Tensor) -> torch.Tensor:
        stacked = tensor.view(hidden, experts, width).transpose(0, 1).contiguous() if flat else tensor
        return stacked if (multiply := scaled(added)) is None else multiply(stacked)

    def tensor(name: str) -> Made:
        layer = re.sub(r"^model\.layers\.\d+\.", "", name)
        if name == "lm_head.weight":
            return Made("model.embed_tokens.weight" if tied else name, scaled(head))
        if name == "model.embed_tokens.weight":
            return Made(name, scaled(embedded))
        if layer == "self_attn.o_proj.weight":
            return Made(name, scaled(added))
        if layer == "mlp.ungated_experts.up_proj":
            return Made(name.replace("ungated_experts.", ""), lambda up: up.view(experts, width, hidden))
        if layer == "mlp.ungated_experts.down_proj":
            return Made(name.replace("ungated_experts.", ""), down)
        return Made(name.replace(layer, RENAMED.get(layer, layer)))

    return Imported(config_of(raw), tensor)


def config_of(raw: Raw) -> DecoderConfig:
    """`blockffn` with latent attention; a free composition with plain attention."""
    sizes: dict[str, Any] = common_fields({"hidden_act": "silu", "rms_norm_eps": 1e-6, **raw})
    sizes |= {"router_aux_loss_coef": 0.0, "tie_word_embeddings": False}  # two factors, two matrices
    blocks: dict[str, Any] = {"num_experts": raw["num_experts"], "moe_intermediate_size": raw["expert_size"]}
    if raw.get("attention_type", "vanilla") == "mla":
        latent: dict[str, Any] = {name: raw.get(name, width) for name, width in LATENT_WIDTHS.items()}
        latent["v_head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]  # whatever its config says
        sizes.pop("num_key_value_heads", None)  # every head has keys of its own
        return BlockFfnConfig(**sizes, **blocks, **latent)
    blocks |= {name: sizes[name] for name in ("hidden_act", "rms_norm_eps")}
    block = BlockFfnConfig(**blocks).blocks["blockffn"] | {"mixer": {"type": "attention"}}
    return HfMoeConfig(**sizes, blocks={"blockffn": block}, block_pattern=["blockffn"])


NAME = "BlockFFN"
BLOCKFFN = Importer(NAME, recognises, read)
