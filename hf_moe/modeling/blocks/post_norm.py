"""The block of OLMo 2 (https://arxiv.org/abs/2501.00656, section 3.2): norms behind the halves, on the branches."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..parts import build
from .base import Block, total


class PostNorm(Block):
    """`x + norm(mixer(x))`, then `x + norm(feed_forward(x))`: both halves read the stream itself (OLMo 2)."""

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _, mixer_losses = self.self_attn(hidden_states, context=context, **mixer_inputs)
        hidden_states = hidden_states + self.post_attention_layernorm(mixed)
        output, router_state, losses = self.mlp(hidden_states, router_state, context)
        return hidden_states + self.post_feedforward_layernorm(output), router_state, total(mixer_losses, losses)
