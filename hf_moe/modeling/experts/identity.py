"""Experts that compute nothing (LongCat-Flash's zero-computation experts, https://arxiv.org/abs/2509.01322, §2.1)."""

from typing import Any

import torch

from .base import Experts


class Identity(Experts):
    """`E_e(x) = x`: a token comes back times the sum of its weights. There are no parameters and no matrix products.

    Beside experts that do compute, use `moe` with `num_zero_experts`; this kind makes a layer of nothing else, such as
    a router's ablation or a layer whose experts were pruned away.
    """

    attribute = "identity_experts"  # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU

    def __init__(self, config: Any, layer_idx: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return tokens * weights.sum(-1, keepdim=True).to(tokens.dtype)
