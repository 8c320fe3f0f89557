"""The block whose feed-forward brings its own residual connection (Chain-of-Experts' released code)."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..parts import build
from .base import Block, total


class OwnResidual(Block):
    """`h = x + mixer(norm(x))`, then `feed_forward(norm(h))`: the un-normed stream ends in every block.

    For a feed-forward whose output contains its input, such as `chain_of_experts` with `include_input`
    (https://arxiv.org/abs/2506.18945; its code's `outer_residual=False`). Any other loses the input.
    """

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @classmethod
    def check(cls, config: Any, *, feed_forward: dict[str, Any], **options: Any) -> None:
        if not feed_forward.get("include_input", False):
            raise ValueError(
                "An own_residual block needs a feed-forward that returns its input too: "
                "{'type': 'chain_of_experts', 'include_input': True, ...}."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        mixed, _, mixer_losses = self.self_attn(self.input_layernorm(hidden_states), context=context, **mixer_inputs)
        normed = self.post_attention_layernorm(hidden_states + mixed)
        output, router_state, losses = self.mlp(normed, router_state, context)
        return output, router_state, total(mixer_losses, losses)
