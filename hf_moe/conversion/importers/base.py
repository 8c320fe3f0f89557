"""What an importer says about a public checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...modeling import DecoderConfig

Raw = dict[str, Any]  # config.json


@dataclass(frozen=True)
class Made:
    """A tensor of ours: one of theirs, reshaped or scaled.

    Args:
        name: theirs.
        make: from theirs to ours; None for as it is.
    """

    name: str
    make: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.make is None else self.make(tensor)


@dataclass(frozen=True)
class Imported:
    """Which config of ours computes the same, and what its tensors are.

    Args:
        config: of a type of ours.
        tensor: our name -> what it is made of.
    """

    config: DecoderConfig
    tensor: Callable[[str], Made]


@dataclass(frozen=True)
class Importer:
    """One family of public checkpoints.

    Args:
        name: of the family.
        recognises: whether a config.json is one of its.
        read: config.json -> `Imported`; raises ValueError for what ours cannot compute.
    """

    name: str
    recognises: Callable[[Raw], bool]
    read: Callable[[Raw], Imported]


def require(raw: Raw, name: str, supported: dict[str, Any]) -> None:
    """Refuse a config.json with other values than an importer knows how to compute.

    Raises:
        ValueError: names the field.
    """
    for field, value in supported.items():
        if raw.get(field, value) != value:
            raise ValueError(f"{name}: {field}={raw[field]!r} cannot be imported; only {value!r} can.")


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Multiply in fp32, round once; None where nothing is to be done."""
    return None if factor == 1 else lambda tensor: (tensor.float() * factor).to(tensor.dtype)


def common_fields(raw: Raw) -> Raw:
    """The sizes and token ids that every decoder has, and its rotary base."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    names += ("initializer_range", "rms_norm_eps", "attention_dropout", "tie_word_embeddings")
    names += ("pad_token_id", "bos_token_id", "eos_token_id", "hidden_act", "num_key_value_heads")
    rotary = {"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10000.0))}
    return {name: raw[name] for name in names if name in raw} | {"rope_parameters": rotary}
