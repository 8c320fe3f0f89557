"""How a model's cache grows with the text, measured by running its mixers on tensors without data."""

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..modeling import CacheMemory, DecoderConfig, moe_layers_if_any
from ..modeling.feed_forwards.base import FeedForward

SHORTEST = 16  # tokens: more than any convolution remembers


@torch.no_grad()
def cache_growth(model: PreTrainedModel) -> CacheMemory:
    """What the cache of one sequence of T tokens weighs: `per_sequence + per_token T` bytes, past every window.

    A sliding window is full then, so it is part of `per_sequence`; so are recurrent states. Keys, values and states
    count in the types in which the model holds them.

    Args:
        model: on the meta device (`hf_moe.modeling.empty_model`); its feed-forwards are disabled by this.

    Raises:
        ValueError: a model without a cache, one that cannot run without data, or one whose cache does not grow evenly.
    """
    disable_feed_forwards(model)
    fix_rotations(model)
    length = first_length(model.config.get_text_config())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # autocast and kernels do not know the meta device
        first, second, third = (cache_bytes(model, length * times) for times in (1, 2, 3))
    if third - second != second - first:
        raise ValueError("the cache does not grow evenly")
    per_token = (second - first) / length
    return CacheMemory(per_token, round(first - per_token * length))


def disable_feed_forwards(model: PreTrainedModel) -> None:
    """Let experts return zeros: what they compute depends on data, and no cache depends on them."""
    if isinstance(model.config, DecoderConfig):  # experts in attention: the one way that knows its sizes beforehand
        model.set_experts_implementation("batched_mm")
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.forward = returns_zeros  # pyright: ignore[reportAttributeAccessIssue]
    for layer in moe_layers_if_any(model):
        if layer.experts is not layer.module:
            layer.experts.forward = lambda hidden_states, *routing, **options: torch.zeros_like(hidden_states)


def returns_zeros(hidden_states: torch.Tensor, state: Any = None, *context: Any) -> tuple[torch.Tensor, Any, None]:
    """In place of a feed-forward of ours; a state of its router passes by."""
    return torch.zeros_like(hidden_states), state, None


def fix_rotations(model: PreTrainedModel) -> None:
    """Stop rotary tables from asking how long the text is (LongRoPE, dynamic NTK): no cache depends on them."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = "default"  # pyright: ignore[reportArgumentType]
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")  # pyright: ignore[reportArgumentType]


def first_length(config: Any) -> int:
    """Tokens after which every window of a config is full, and nothing waits to be compressed (DeepSeek-V4)."""
    windows = numbers_of(config, ("window", "attention_chunk_size"))
    unit = math.lcm(*numbers_of(config, ("compress_rate", "compress_ratio")))
    return unit * math.ceil(max([SHORTEST, *(2 * window for window in windows)]) / unit)


def numbers_of(config: Any, words: tuple[str, ...]) -> list[int]:
    """The positive whole numbers in the fields of a config whose names have one of these words."""
    found: list[int] = []
    for value in (value for name, value in vars(config).items() if any(word in name for word in words)):
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [number for number in values if type(number) is int and number > 0]
    return found


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """What the cache holds after so many tokens."""
    ids = torch.zeros(1, length, dtype=torch.long)
    # without a cache to begin with, Transformers looks for packed sequences in our `position_ids`
    begun = {"past_key_values": DynamicCache(config=model.config)} if isinstance(model.config, DecoderConfig) else {}
    try:
        output = model.base_model(input_ids=ids, use_cache=True, **begun)
    except (RuntimeError, ValueError) as error:  # torch's way to say that a value is needed
        raise ValueError(f"the model does not run without data: {str(error).splitlines()[0]}") from error
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ValueError("the model has no cache")
    found: dict[int, torch.Tensor] = {}
    collect(vars(cache), found)
    return sum(tensor.nbytes for tensor in found.values())


def collect(held: Any, found: dict[int, torch.Tensor]) -> None:
    """Gather the floating-point tensors in whatever a cache layer keeps; the others are counters."""
    if isinstance(held, torch.Tensor) and held.is_floating_point():
        found[id(held)] = held
    elif isinstance(held, dict):
        for item in held.values():
            collect(item, found)
    elif isinstance(held, list | tuple):
        for item in held:
            collect(item, found)
    elif hasattr(held, "__dict__") and not isinstance(held, type | nn.Module | torch.Tensor | PreTrainedConfig):
        collect(vars(held), found)
