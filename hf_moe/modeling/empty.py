"""A model of any config without its weights: every tensor has a shape and a type, and takes no memory."""

from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

KINDS: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModel,
)  # the first that knows a config


def kind_of(config: PreTrainedConfig) -> Any:
    """The Auto class that makes a config's model: with a language model's head, if it has one.

    Raises:
        ValueError: a config that no class of Transformers, or of ours, is made from.
    """
    for kind in KINDS:
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(f"No model class is known for configs of type {config.model_type!r}.")


def empty_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode, with parameters of this type (None: what the config says)."""
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return kind_of(config).from_config(config, **options).eval()
