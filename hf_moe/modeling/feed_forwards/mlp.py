"""The dense, gated feed-forward of Llama."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from .base import FeedForward, FeedForwardOutput


class Mlp(FeedForward):
    """Dense SwiGLU, as in Llama: `W_down (act(W_gate x) * W_up x)`. A router state passes through untouched."""

    tp_plan = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}

    def __init__(self, config: Any, layer_idx: int, *, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        return self.down_proj(self.activations(hidden_states)), router_state, None

    def activations(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, F) what the last matrix reads."""
        return self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
