"""The block whose halves work side by side."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..parts import build
from .base import Block, total


class Parallel(Block):
    """`x + mixer(norm(x)) + feed_forward(norm(x))`: both read one normed input (PaLM, GPT-J, BAM)."""

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
