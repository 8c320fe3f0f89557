"""What a config alone says about a model: its layers, its parameters, what its cache weighs."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..modeling import empty_model, parameters_of
from .cache_growth import cache_growth
from .layer_table import LayerRow, layer_table
from .routing import RoutingFacts


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without its weights.

    Args:
        model_type: of the config.
        architecture: class of the model that was counted: the language model, if the config has one.
        dtype: type of the parameters, which the cache follows where its layers do.
        quantization: how the checkpoint is quantised, None if it is not; counts are those of the whole model.
        parameters: all of them.
        active_parameters: that one token uses, embedding and head included.
        embedding_parameters: embedding and head; tied ones count once.
        parameters_outside_layers: embedding, head, and whatever does not stand in the layers below.
        cache_bytes_per_token: by which the cache of one sequence grows with each token past every window.
        cache_bytes_fixed: recurrent states and full sliding windows of one sequence.
        cache_note: why the cache could not be measured; both figures are None then.
        layers: what stands in the decoder.
    """

    model_type: str
    architecture: str
    dtype: str
    quantization: str | None
    parameters: int
    active_parameters: int
    embedding_parameters: int
    parameters_outside_layers: int
    cache_bytes_per_token: float | None
    cache_bytes_fixed: int | None
    cache_note: str | None
    layers: list[LayerRow]


@dataclass(frozen=True)
class Inspection:
    """Everything that was found out about a model.

    Args:
        model: its name: a folder or a hub id.
        facts: from its config.
        disk_bytes: size of its safetensors, None if they are not on this machine.
        routing: from running it; None if nothing was run.
    """

    model: str
    facts: ModelFacts
    disk_bytes: int | None = None
    routing: RoutingFacts | None = None


def model_facts(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> ModelFacts:
    """Describe the model of a config without making it: sizes come from the meta device.

    Args:
        config: of any model of Transformers, or of ours; a native mixture must be one that `hf_moe.moe_layers` knows.
        dtype: of parameters and cache; None: what the config says, else float32.

    Raises:
        ValueError: no model class, or a mixture whose layers are not known.
    """
    dtype = dtype or dtype_of(config) or torch.float32
    model = empty_model(config, dtype)
    counts, rows = parameters_of(model), layer_table(model)
    quantization: Any = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method", "yes") if isinstance(quantization, dict) else quantization
    cache, note = None, None
    try:
        cache = cache_growth(model)
    except ValueError as error:
        note = str(error)
    return ModelFacts(
        model_type=config.model_type,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        quantization=None if method is None else str(method),
        parameters=counts.total,
        active_parameters=counts.active,
        embedding_parameters=counts.embedding,
        parameters_outside_layers=counts.total - sum((row.last - row.first + 1) * row.parameters for row in rows),
        cache_bytes_per_token=None if cache is None else cache.per_token,
        cache_bytes_fixed=None if cache is None else cache.per_sequence,
        cache_note=note,
        layers=rows,
    )


def dtype_of(config: PreTrainedConfig) -> torch.dtype | None:
    """The type that a config names for the weights, its own or its text model's."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found
