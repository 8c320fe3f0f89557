"""Residual blocks: a token mixer and a feed-forward around the residual stream.

`forward(hidden_states (B, T, D), router_state, context=, **mixer_inputs) -> (hidden_states, router_state, losses)`

What carries a gradient goes in positionally and comes out in a flat tuple: reentrant checkpointing sees nothing else.
"""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .feed_forward import FEED_FORWARDS, FeedForwardOutput
from .layers import RMSNorm
from .mixers import MIXERS
from .parts import Part, Slot, build
from .routers import NO_CONTEXT, RoutingContext


class Block(GradientCheckpointingLayer, Part):
    """Base class. The two halves keep the names that checkpoints, PEFT targets and sharding plans already use."""

    slots = {"mixer": Slot("self_attn", MIXERS), "feed_forward": Slot("mlp", FEED_FORWARDS)}

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = build(MIXERS, mixer, config, layer_idx)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: RoutingContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        raise NotImplementedError


class PreNorm(Block):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))`: Llama, Mixtral, Qwen3."""

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer=mixer, feed_forward=feed_forward)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: RoutingContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **mixer_inputs)
        hidden_states = hidden_states + mixed
        output, router_state, losses = self.mlp(self.post_attention_layernorm(hidden_states), router_state, context)
        return hidden_states + output, router_state, losses


class Parallel(Block):
    """`x + mixer(norm(x)) + feed_forward(norm(x))`: both read one normed input (PaLM, GPT-J, BAM)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: RoutingContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        normed = self.input_layernorm(hidden_states)
        mixed, _ = self.self_attn(normed, **mixer_inputs)
        output, router_state, losses = self.mlp(normed, router_state, context)
        return hidden_states + mixed + output, router_state, losses


BLOCKS: dict[str, type[Block]] = {
    "pre_norm": PreNorm,
    "parallel": Parallel,
}
