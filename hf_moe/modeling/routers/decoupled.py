"""AdaMoE-VLA's router: what chooses the experts is not what weighs them (https://arxiv.org/abs/2510.14300).

    p = softmax(W x),   chosen = topk(p),   w_e = p_e + (A x)_e       for e in chosen, not renormalised

Not related to AdaMoE's null experts (https://arxiv.org/abs/2406.13233).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing

COMBINATIONS = ("probability", "logit", "concatenated")


class Decoupled(Router):
    """Top-k choice by `weight` W (E, D), combine weights by `scale_weight` A besides.

    Args:
        top_k: experts per token; the released code's 1 is the default.
        combination: how a chosen expert is weighed. `probability` is the formula above; `logit` adds the raw logit
            instead of the probability, as the released JAX code does; `concatenated` is its second variant,
            `softmax(A [x; W x])_e` over all experts, with A (E, D + E).
        initializer_range: standard deviation of A at the start. 0.006 is the paper's figure for its routers; W starts
            with the model's.
    """

    normalize = False

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 1,
        combination: str = "probability",
        initializer_range: float = 0.006,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.combination, self.initializer_range = top_k, combination, initializer_range
        width = config.hidden_size + (num_experts if combination == "concatenated" else 0)
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.scale_weight = nn.Parameter(torch.empty(num_experts, width))

    @classmethod
    def check(cls, config: Any, *, combination: str, **options: Any) -> None:
        if combination not in COMBINATIONS:
            raise ValueError(f"combination={combination!r} is unknown; choose from {list(COMBINATIONS)}.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.normal_(self.scale_weight, std=self.initializer_range)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        scores = self.scores(logits)
        indices = scores.topk(self.top_k, dim=-1).indices
        if self.combination == "concatenated":
            scales = F.linear(torch.cat([tokens, logits.to(tokens.dtype)], -1), self.scale_weight).float().softmax(-1)
        else:
            base = scores if self.combination == "probability" else logits.float()
            scales = base + F.linear(tokens, self.scale_weight).float()
        return Routing(logits, scales.gather(1, indices).to(logits.dtype), indices)
