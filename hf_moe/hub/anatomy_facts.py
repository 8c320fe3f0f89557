"""What a config says about a model without its weights: sizes, and each kind of layer in a line."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..analysis.layer_table import LayerRow, layer_table
from ..modeling import DecoderConfig, empty_model, parameters_of


@dataclass(frozen=True)
class Facts:
    """Of one model folder.

    Args:
        config: of the model.
        total: parameters.
        active: parameters that one token uses; None where nobody can say.
        layers: (which layers, what they are made of).
        bytes: of the weight files.
        sparse: whether there are experts.
    """

    config: PreTrainedConfig
    total: int
    active: int | None
    layers: list[tuple[str, str]]
    bytes: int
    sparse: bool

    @property
    def ours(self) -> bool:
        """Whether the architecture comes from this package."""
        return isinstance(self.config, DecoderConfig)


def facts_of(folder: Path) -> Facts:
    """Read a folder's config and the sizes of its files; weights are not read.

    Raises:
        ValueError: the config cannot be read, or its architecture is unknown.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: cannot read its config: {str(error).splitlines()[0]}") from error
    model = empty_model(config)
    try:
        counts, rows = parameters_of(model), layer_table(model)
    except ValueError:  # a mixture whose layers are not known: no figure is better than a wrong one
        total, active, rows = sum(parameter.numel() for parameter in model.parameters()), None, []
    else:
        total, active = counts.total, counts.active
    layers = of_ours(config) if isinstance(config, DecoderConfig) else [in_words(row) for row in rows]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Facts(config, total, active, layers, size, any(row.num_experts for row in rows))


def of_ours(config: DecoderConfig) -> list[tuple[str, str]]:
    """The composition, spelt out as in the config; equal neighbours in one row."""
    blocks = [
        config.blocks[config.block_pattern[n % len(config.block_pattern)]] for n in range(len(config.block_starts))
    ]
    rows: dict[str, list[str]] = {}
    for text, group in groupby(enumerate(map(describe, blocks)), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.setdefault(text, []).append(span)
    return [(", ".join(spans), text) for text, spans in rows.items()]


def describe(spec: dict[str, Any]) -> str:
    """A part and its options in one line, inner parts in brackets."""
    inner = [
        f"{name}: {describe(value) if isinstance(value, dict) and 'type' in value else json.dumps(value)}"
        for name, value in spec.items()
        if name != "type" and value not in (None, False)
    ]
    return spec.get("type", "block") + (f" ({', '.join(inner)})" if inner else "")


def in_words(row: LayerRow) -> tuple[str, str]:
    """One run of equal layers of a native model."""
    which = f"{row.first}" if row.first == row.last else f"{row.first}-{row.last}"
    what = [row.mixer, row.feed_forward]
    if row.feed_forward_width is not None:
        what[-1] += f" of width {row.feed_forward_width}"
    if row.num_experts:
        chosen = "a varying number" if row.top_k is None else f"{row.top_k}"
        width = "" if row.expert_width is None else f" of width {row.expert_width}"
        what.append(f"{row.num_experts} experts{width}, {chosen} per token ({row.scoring})")
    if row.shared_width:
        what.append(f"shared experts of width {row.shared_width}")
    return which, ", ".join(filter(None, what))
