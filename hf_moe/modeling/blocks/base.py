"""What every residual block promises: a token mixer and a feed-forward around the residual stream.

`forward(hidden_states (B, T, D), router_state, context=, **mixer_inputs) -> (hidden_states, router_state, losses)`

What carries a gradient goes in positionally and comes out in a flat tuple: reentrant checkpointing sees nothing else.
"""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..mixers import MIXERS
from ..parts import Part, Slot, build


class Block(GradientCheckpointingLayer, Part):
    """Base class. The two halves keep the names that checkpoints, PEFT targets and sharding plans already use."""

    slots = {"mixer": Slot("self_attn", MIXERS), "feed_forward": Slot("mlp", FEED_FORWARDS)}

    def __init__(self, config: Any, layer_idx: int, mixer: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = build(MIXERS, mixer, config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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
