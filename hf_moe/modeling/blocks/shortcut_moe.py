"""The block with a shortcut-connected mixture of experts (LongCat-Flash, https://arxiv.org/abs/2509.01322, §2.2).

    x1 = x + mixer_0(norm(x)),   n1 = norm(x1),   m = moe(n1),   x2 = x1 + dense_0(n1)
    x3 = x2 + mixer_1(norm(x2)),   y = x3 + dense_1(norm(x3)) + m

The mixture's result is first needed at the end: with experts on several devices, their communication overlaps with the
dense half. Order and names are those of Transformers' `longcat_flash`; ScMoE is https://arxiv.org/abs/2404.05019.
"""

from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..mixers import MIXERS
from ..parts import Part, Slot, build
from .base import Block, total


class ShortcutMoe(Block):
    """Two mixers and two dense feed-forwards in a row, with a mixture beside all but the first of the four.

    It spans two of `num_hidden_layers`, as each mixer has a cache layer of its own.

    Args:
        mixer: spec of both mixers.
        feed_forward: spec of the mixture; a router state passes through it only.
        dense: spec of both feed-forwards in the row, e.g. `{"type": "mlp", "intermediate_size": 12288}`.
    """

    slots = {
        "mixer": Slot("self_attn.*", MIXERS),
        "feed_forward": Slot("mlp", FEED_FORWARDS),
        "dense": Slot("mlps.*", FEED_FORWARDS),
    }
    num_mixers = 2

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        mixer: dict[str, Any],
        feed_forward: dict[str, Any],
        dense: dict[str, Any],
    ) -> None:
        Part.__init__(self)
        indices = (layer_idx, layer_idx + 1)
        self.self_attn = nn.ModuleList(build(MIXERS, mixer, config, index) for index in indices)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)
        self.mlps = nn.ModuleList(build(FEED_FORWARDS, dense, config, index) for index in indices)
        self.input_layernorm = nn.ModuleList(RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in indices)
        self.post_attention_layernorm = nn.ModuleList(
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in indices
        )

    @classmethod
    def check(cls, config: Any, *, dense: dict[str, Any], **options: Any) -> None:
        plain = sorted(name for name, part in FEED_FORWARDS.items() if not (part.routed or part.carries_state))
        if dense["type"] not in plain:
            raise ValueError(
                f"The feed-forward `dense` of a shortcut_moe block is {dense['type']!r}, whose experts belong into "
                f"`feed_forward`; choose from {plain}."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        hidden_states, normed, losses = self.mix(0, hidden_states, context, **mixer_inputs)
        shortcut, router_state, moe_losses = self.mlp(normed, router_state, context)
        output, _, dense_losses = self.mlps[0](normed, None, context)
        hidden_states, normed, more_losses = self.mix(1, hidden_states + output, context, **mixer_inputs)
        last_output, _, last_losses = self.mlps[1](normed, None, context)
        for other in (moe_losses, dense_losses, more_losses, last_losses):
            losses = total(losses, other)
        return hidden_states + last_output + shortcut, router_state, losses

    def mix(
        self, index: int, hidden_states: torch.Tensor, context: ForwardContext, **mixer_inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The residual stream after mixer `index`, the same normed, and the mixer's balance losses."""
        normed = self.input_layernorm[index](hidden_states)
        mixed, _, losses = self.self_attn[index](normed, context=context, **mixer_inputs)
        hidden_states = hidden_states + mixed
        return hidden_states, self.post_attention_layernorm[index](hidden_states), losses
