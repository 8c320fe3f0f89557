"""Families of dense models: what their configs mean, and where their tensors are.

A family that stores a tensor of Llama's under another name, fused with others or in other units says so in `locate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .recipes import Recipe, Tensor


def as_llama(config: Any, source: int, name: str) -> Recipe:
    """The tensor under its own name."""
    return Tensor(source, name)


@dataclass(frozen=True)
class Family:
    """One model type.

    Args:
        facts: config -> the facts of `Dense` that differ from Llama's; `fields` among them corrects flat fields.
            Raises ValueError for what no target could express.
        locate: (config, number of the source, Llama's name of a tensor) -> its recipe.
    """

    facts: Callable[[Any], dict[str, Any]]
    locate: Callable[[Any, int, str], Recipe] = as_llama


def _llama(config: Any) -> dict[str, Any]:
    return {"attention_bias": "qkvo" if config.attention_bias else "none", "mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> dict[str, Any]:
    return {"sliding_layers": (config.sliding_window is not None,) * config.num_hidden_layers}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"attention_bias": "qkv", "sliding_layers": sliding_layers(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    bias = "qkvo" if config.attention_bias else "none"
    return {"qk_norm": "head", "attention_bias": bias, "sliding_layers": sliding_layers(config)}


def sliding_layers(config: Any) -> tuple[bool, ...]:
    """Per layer, whether its attention slides."""
    return tuple(kind == "sliding_attention" for kind in config.layer_types)


def _hf_moe(config: Any) -> dict[str, Any]:
    """Our own composition, if it is one dense block repeated."""
    names = set(config.block_pattern)
    block = config.blocks[config.block_pattern[0]]
    mixer, feed_forward = block["mixer"], block["feed_forward"]
    if len(names) != 1 or mixer["type"] != "attention" or feed_forward["type"] != "mlp":
        raise ValueError("an hf_moe source must be one block of `attention` and `mlp`, repeated")
    if mixer["partial_rotary_factor"] != 1:
        raise ValueError(f"partial_rotary_factor is {mixer['partial_rotary_factor']}, all targets rotate whole heads")
    biases = {(False, False): "none", (True, False): "qkv", (True, True): "qkvo", (False, True): "o"}
    return {
        "block_type": block["type"],
        "intermediate_size": feed_forward["intermediate_size"],
        "qk_norm": "head" if mixer["qk_norm"] else "none",
        "attention_bias": biases[mixer["qkv_bias"], mixer["output_bias"]],
        "rotary_layers": (mixer["rotary"],) * config.num_hidden_layers,
        "sliding_layers": (mixer["sliding"],) * config.num_hidden_layers,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "hf_moe": Family(_hf_moe),
}
