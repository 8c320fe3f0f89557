"""Residual blocks: a token mixer and a feed-forward around the residual stream.

`forward(hidden_states (B, T, D), router_state, context=, **mixer_inputs) -> (hidden_states, router_state, losses)`

What carries a gradient goes in positionally and comes out in a flat tuple: reentrant checkpointing sees nothing else.
"""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .context import NO_CONTEXT, ForwardContext
from .feed_forward import FEED_FORWARDS, FeedForwardOutput
from .layers import RMSNorm
from .mixers import MIXERS
from .parts import Part, Slot, build


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


class PreNorm(Block):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))`: Llama, Mixtral, Qwen3."""

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _, mixer_losses = self.self_attn(self.input_layernorm(hidden_states), context=context, **mixer_inputs)
        hidden_states = hidden_states + mixed
        output, router_state, losses = self.mlp(self.post_attention_layernorm(hidden_states), router_state, context)
        return hidden_states + output, router_state, total(mixer_losses, losses)


class Parallel(Block):
    """`x + mixer(norm(x)) + feed_forward(norm(x))`: both read one normed input (PaLM, GPT-J, BAM)."""

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        normed = self.input_layernorm(hidden_states)
        mixed, _, mixer_losses = self.self_attn(normed, context=context, **mixer_inputs)
        output, router_state, losses = self.mlp(normed, router_state, context)
        return hidden_states + mixed + output, router_state, total(mixer_losses, losses)


class MixerOnly(Block):
    """`x + mixer(norm(x))`: a layer without feed-forward, for stacks such as Hunyuan-TurboS' attention-Mamba-FFN."""

    slots = {"mixer": Slot("self_attn", MIXERS)}

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _, losses = self.self_attn(self.input_layernorm(hidden_states), context=context, **mixer_inputs)
        return hidden_states + mixed, router_state, losses


def total(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The balance losses of both halves of a block."""
    return first + second if first is not None and second is not None else second if first is None else first


BLOCKS: dict[str, type[Block]] = {
    "pre_norm": PreNorm,
    "parallel": Parallel,
    "mixer_only": MixerOnly,
}
