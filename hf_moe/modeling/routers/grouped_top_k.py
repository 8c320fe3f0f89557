"""Pangu Pro MoE's grouped router: equally many experts from every group (https://arxiv.org/abs/2505.21411).

s = softmax(W x) over all E experts;   chosen = in each of the M groups of E/M experts, the K/M with the highest s
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..ops.expert_groups import within_groups_loss
from .base import Router, Routing


class GroupedTopK(Router):
    """The K/M best of each group; weights are their scores s, a softmax over all groups, not renormalised.

    With one device per group every device has the same work. Inside a group experts can still be unbalanced: the
    Switch loss of this choice is the paper's auxiliary loss. It is 1 at perfect balance and E/K if every token
    uses the same K experts with all its probability.

    Args:
        top_k: experts per token K, a multiple of `num_groups`.
        num_groups: M; consecutive experts form a group.
        normalize: divide a token's weights by their sum; the paper does not.
        learned_scale: multiply each expert's weight by a learned number that starts at 1 (the released weights'
            `router_scale`, which the paper does not mention).
        group_loss_coef: weight of `within_groups_loss`, which the paper does not have.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 8,
        num_groups: int = 8,
        normalize: bool = False,
        learned_scale: bool = False,
        group_loss_coef: float = 0.0,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.num_groups, self.normalize = top_k, num_groups, normalize
        self.group_loss_coef = group_loss_coef
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.router_scale = nn.Parameter(torch.empty(num_experts)) if learned_scale else None

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        groups, top_k = spec["num_groups"], spec["top_k"]
        if groups < 1 or num_experts % groups:
            valid = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ValueError(f"num_groups={groups} does not divide {num_experts} experts; use one of {valid}.")
        if not 1 <= top_k <= num_experts or top_k % groups:
            raise ValueError(
                f"top_k={top_k} is not the same number from each of num_groups={groups} groups of "
                f"{num_experts // groups} experts; use one of {list(range(groups, num_experts + 1, groups))}."
            )

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        if self.router_scale is not None:
            init.ones_(self.router_scale)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        grouped = self.scores(logits).unflatten(-1, (self.num_groups, -1))  # (N, M, E / M)
        weights, indices = grouped.topk(self.top_k // self.num_groups, dim=-1)  # (N, M, K / M)
        first = torch.arange(self.num_groups, device=tokens.device) * grouped.shape[-1]
        weights, indices = weights.flatten(1), (indices + first[:, None]).flatten(1)  # (N, K)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.router_scale is not None:
            weights = weights * self.router_scale[indices]
        weights, loss = weights.to(logits.dtype), None
        if context.losses and self.group_loss_coef:
            loss = within_groups_loss(self.scores(logits), indices, weights, self.num_groups, context.token_mask)
            loss = self.group_loss_coef * loss
        return Routing(logits, weights, indices, loss=loss)
