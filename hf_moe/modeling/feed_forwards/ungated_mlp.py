"""The dense feed-forward without a gate."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from .base import FeedForward, FeedForwardOutput


class UngatedMlp(FeedForward):
    """Dense and without a gate: `W_down act(W_up x)`. A router state passes through untouched.

    Args:
        intermediate_size: width between the two layers.
        activation: a key of Transformers' `ACT2FN`; `relu2` is Primer's squared ReLU (PLM, Nemotron).
        bias: biases on both layers.
    """

    tp_plan = {"up_proj": "colwise", "down_proj": "rowwise"}

    def __init__(
        self, config: Any, layer_idx: int, *, intermediate_size: int, activation: str = "relu2", bias: bool = False
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[activation]

    @classmethod
    def check(cls, config: Any, *, activation: str, **options: Any) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states))), router_state, None
