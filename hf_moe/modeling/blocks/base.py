"""What every residual block promises: a token mixer and a feed-forward around the residual stream.

`forward(hidden_states (B, T, D), router_state, context=, **mixer_inputs) -> (hidden_states, router_state, losses)`

What carries a gradient goes in positionally and comes out in a flat tuple: reentrant checkpointing sees nothing else.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..mixers import MIXERS
from ..parts import Part, Slot, build


class Block(GradientCheckpointingLayer, Part):
    """Base class. The two halves keep the names that checkpoints, PEFT targets and sharding plans already use."""

    slots = {"mixer": Slot("self_attn", MIXERS), "feed_forward": Slot("mlp", FEED_FORWARDS)}
    num_mixers: ClassVar[int] = 1  # it spans so many of `num_hidden_layers`: each mixer has a cache layer of its own

    def __init__(self, config: Any, layer_idx: int, mixer: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = build(MIXERS, mixer, config, layer_idx)
        if config.published_names:
            self.register_load_state_dict_pre_hook(partial(use_our_names, config.published_names))

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        raise NotImplementedError


def total(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The balance losses of both halves of a block."""
    return first + second if first is not None and second is not None else second if first is None else first


def use_our_names(
    published_names: dict[str, str], block: Block, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Accept published names in a plain `load_state_dict`, with which `Trainer` resumes (as it does for experts, see
    `stack_per_expert_tensors`); `from_pretrained` knows them from `host.py`."""
    for theirs, ours in published_names.items():
        for name in [name for name in state_dict if name.startswith(prefix + theirs)]:
            state_dict[prefix + ours + name.removeprefix(prefix + theirs)] = state_dict.pop(name)
