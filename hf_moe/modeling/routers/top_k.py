"""Linear router that keeps the k best experts (Mixtral, Qwen-MoE, OLMoE, GShard)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing

SCORINGS = ("softmax", "softmax_selected")


class TopK(Router):
    """`logits = W x`; weights are `softmax(logits)` of the k best, renormalised or not.

    Args:
        top_k: experts per token.
        normalize: divide the k weights by their sum (Mixtral; Qwen3-MoE with `norm_topk_prob`).
        scoring: `softmax` over all experts before the choice, or `softmax_selected` over the chosen logits only
            (JetMoE, GPT-OSS; its weights always sum to 1).
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: bool = True,
        scoring: str = "softmax",
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize, self.scoring = top_k, normalize, scoring
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, normalize: bool, scoring: str, **options: Any) -> None:
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} is unknown; choose from {list(SCORINGS)}.")
        if scoring == "softmax_selected" and not normalize:
            raise ValueError("scoring='softmax_selected' is normalized by nature; normalize=False needs 'softmax'.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        if self.scoring == "softmax_selected":
            chosen, indices = logits.float().topk(self.top_k, dim=-1)
            weights = chosen.softmax(-1)
        else:
            weights, indices = self.scores(logits).topk(self.top_k, dim=-1)
            if self.normalize:
                weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(logits.dtype), indices)
