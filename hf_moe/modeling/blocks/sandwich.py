"""The block of Gemma 2 and 3 (https://arxiv.org/abs/2408.00118, section 2): norms before and behind both halves."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..parts import build
from .base import Block, total


class Sandwich(Block):
    """`x + norm(mixer(norm(x)))`, then `x + norm(feed_forward(norm(x)))`: Gemma 2 and 3.

    `post_attention_layernorm` is behind the mixer here, not before the feed-forward as in a `pre_norm` block. Gemma's
    own norms multiply by 1 + weight, ours by the weight.
    """

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _, mixer_losses = self.self_attn(self.input_layernorm(hidden_states), context=context, **mixer_inputs)
        hidden_states = hidden_states + self.post_attention_layernorm(mixed)
        output, router_state, losses = self.mlp(self.pre_feedforward_layernorm(hidden_states), router_state, context)
        return hidden_states + self.post_feedforward_layernorm(output), router_state, total(mixer_losses, losses)
