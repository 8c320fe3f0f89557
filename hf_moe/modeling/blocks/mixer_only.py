"""The block without a feed-forward."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..mixers import MIXERS
from ..parts import Slot
from .base import Block


class MixerOnly(Block):
    """`x + mixer(norm(x))`: a layer without feed-forward, for stacks such as Hunyuan-TurboS' attention-Mamba-FFN."""

    slots = {"mixer": Slot("self_attn", MIXERS)}

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any]) -> None:
        super().__init__(config, layer_idx, mixer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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
