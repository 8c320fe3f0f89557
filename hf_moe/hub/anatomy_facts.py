"""What a config says about a model without its weights: sizes, and each kind of layer in a line."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..modeling import DecoderConfig, count_parameters, moe_layers

SAFE_TENSORS = "*.safetensors"


@dataclass(frozen=True)
class Facts:
    """Of one model folder.

    Args:
        config: of the model.
        total: parameters.
        active: parameters that one token uses; None where nobody can say.
        layers: (which layers, what they are made of).
        bytes: of the weight files.
    """

    config: PreTrainedConfig
    total: int
    active: int | None
    layers: list[tuple[str, str]]
    bytes: int

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
    total, active, layers = of_ours(config) if isinstance(config, DecoderConfig) else of_native(config)
    return Facts(config, total, active, layers, sum(path.stat().st_size for path in folder.glob(SAFE_TENSORS)))


def of_ours(config: DecoderConfig) -> tuple[int, int, list[tuple[str, str]]]:
    """Counts, and the composition that the config spells out."""
    counts = count_parameters(config)
    names = [config.block_pattern[number % len(config.block_pattern)] for number in range(len(config.block_starts))]
    blocks = [(name, describe(config.blocks[name])) for name in names]
    return counts.total, counts.active, ranges(blocks)


def of_native(config: PreTrainedConfig) -> tuple[int, int | None, list[tuple[str, str]]]:
    """Counts from an empty model, and its sparse layers as `moe_layers` sees them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    total = sum(parameters.values())
    try:
        sparse = list(moe_layers(model))
    except ValueError:  # dense, or a mixture of a kind that we do not know
        return total, None if any("expert" in name for name, _ in model.named_modules()) else total, []
    unused, lines = 0.0, []
    for layer in sparse:
        share = layer.top_k / (layer.num_experts + layer.num_zero_experts)
        unused += (1 - share) * sum(parameters[id(parameter)] for parameter in layer.experts.parameters())
        shared = " and shared ones" if layer.shared_experts is not None else ""
        lines.append((layer.name, f"{layer.num_experts} experts{shared}, {layer.top_k} per token, {layer.scoring}"))
    kinds = Counter(text for _, text in lines)
    return total, round(total - unused), [(f"{count} sparse layers", text) for text, count in kinds.items()]


def ranges(blocks: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Equal neighbours as one row: numbers of the blocks, from 0, and what they are."""
    rows: dict[str, list[str]] = {}
    for text, group in groupby(enumerate(blocks), key=lambda item: item[1][1]):
        numbers = [number for number, _ in group]
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.setdefault(text, []).append(span)
    return [(f"{', '.join(spans)}", text) for text, spans in rows.items()]


def describe(spec: dict[str, Any]) -> str:
    """A part and its options in one line, inner parts in brackets."""
    inner = [
        f"{name}: {describe(value) if isinstance(value, dict) and 'type' in value else json.dumps(value)}"
        for name, value in spec.items()
        if name != "type" and value not in (None, False)
    ]
    return spec.get("type", "block") + (f" ({', '.join(inner)})" if inner else "")
