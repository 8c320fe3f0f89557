"""Spark Transformer's feed-forward (https://arxiv.org/abs/2506.06644): part of the input predicts what will be active.

    y = W_down (act(relu(s - theta)) * W_up x[r:]),    s = W_gate x[:r]

theta is the statistical top-k threshold of the token's scores s: about k of F pass. act(0) = 0, so that the others add
nothing, and their rows of W_up and columns of W_down need not be read. No code is released. The paper says GELU; it
starts from Gemma-2, whose GELU is the tanh form. Plain torch computes all F: the published function, not the published
speed.
Letters: B batch, T time, D width, F inner width, r predicting inputs.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from ..ops.statistical_top_k import statistical_top_k
from .base import FeedForward, FeedForwardOutput


class Spark(FeedForward):
    """Dense weights, of which each token uses about `top_k` rows. A router state passes through untouched.

    W_gate (F, r) and W_up (F, D - r) together are as large as one matrix: with 3/2 of a gated feed-forward's F it has
    as many parameters.

    Args:
        intermediate_size: F (13824 in the paper's Gemma-2 2B, where D is 2304).
        top_k: k, how many of the F should be active; 8% of them if None, as in the paper.
        predictor_size: r; 4/9 of D, rounded down, if None: the paper's 1024 of 2304.
        activation: a key of Transformers' `ACT2FN`, one that is 0 at 0.
    """

    # no tp_plan: the threshold needs a token's scores in one place

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        intermediate_size: int,
        top_k: int | None = None,
        predictor_size: int | None = None,
        activation: str = "gelu_pytorch_tanh",
    ) -> None:
        super().__init__()
        self.sizes = input_sizes(config, predictor_size)
        self.top_k = number_active(intermediate_size, top_k)
        self.gate_proj = nn.Linear(self.sizes[0], intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.sizes[1], intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    @classmethod
    def check(
        cls,
        config: Any,
        *,
        intermediate_size: int,
        top_k: int | None,
        predictor_size: int | None,
        activation: str,
        **options: Any,
    ) -> None:
        if not 0 < (active := number_active(intermediate_size, top_k)) < intermediate_size:
            raise ValueError(
                f"top_k={active} must be between 1 and intermediate_size - 1 = {intermediate_size - 1}; for all of "
                "them use `mlp`."
            )
        rank, rest = input_sizes(config, predictor_size)
        if rank < 1 or rest < 1:
            raise ValueError(
                f"predictor_size={rank} must be between 1 and hidden_size - 1 = {config.hidden_size - 1}."
            )
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")
        if ACT2FN[activation](torch.zeros(1, device="cpu")).item():
            raise ValueError(f"activation={activation!r} is not 0 at 0: idle neurons would be active. Try 'gelu'.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        predicting, rest = hidden_states.split(self.sizes, -1)
        gate = self.act_fn(statistical_top_k(self.gate_proj(predicting), self.top_k))  # (B, T, F), mostly 0
        return self.down_proj(gate * self.up_proj(rest)), router_state, None


def input_sizes(config: Any, predictor_size: int | None) -> tuple[int, int]:
    """How the input is cut: r and D - r."""
    rank = config.hidden_size * 4 // 9 if predictor_size is None else predictor_size
    return rank, config.hidden_size - rank


def number_active(intermediate_size: int, top_k: int | None) -> int:
    """k."""
    return round(0.08 * intermediate_size) if top_k is None else top_k
