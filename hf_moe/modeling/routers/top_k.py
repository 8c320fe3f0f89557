"""Linear router that keeps the k best experts (Mixtral, Qwen-MoE, GShard; DeepSeek-V2 and V3, LongCat-Flash).

logits = W x + b,   s = softmax(logits) or sigmoid(logits),   chosen = topk(s + selection bias),   w_e = scale s_e
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..ops.expert_groups import between_groups_loss
from .base import Router, Routing

SCORINGS = ("softmax", "softmax_selected", "sigmoid")
GROUP_SCORES = {"max": 1, "top2_sum": 2}  # how many of a group's best scores are added up


class TopK(Router):
    """The k best experts by score; weights are their scores, renormalised or not.

    Args:
        top_k: experts per token.
        normalize: divide the k weights by their sum (Mixtral; Qwen3-MoE with `norm_topk_prob`).
        scoring: `softmax` over all experts before the choice, `softmax_selected` over the chosen logits only (JetMoE,
            GPT-OSS; its weights always sum to 1), or `sigmoid` of each logit (DeepSeek-V3).
        selection_bias: add the buffer `e_score_correction_bias` to the scores for the choice, not for the weights
            (https://arxiv.org/abs/2408.15664). It starts at 0, and only a balancing callback moves it.
        scale: multiplies the weights at the end (routed scaling factor: 2.5 in DeepSeek-V3, 6 in LongCat-Flash).
        num_groups: consecutive experts form so many groups of equal size; 1 for no groups.
        groups_per_token: groups that a token's experts may be from (https://arxiv.org/abs/2412.19437, §2.1.2).
        group_score: by what groups are compared: their best score, `max` (DeepSeek-V2), or the sum of their two best,
            `top2_sum` (V3; both of biased scores).
        group_loss_coef: weight of `between_groups_loss`; 0.05 in DeepSeekMoE 145B, whose groups are devices.
        bias: add a learned bias to the logits (LongCat-Flash's `router_bias`, which Transformers stores and ignores).
        float32: compute the logits in fp32 whatever the model's dtype. By default where DeepSeek and LongCat do: with
            sigmoid scores, a selection bias or groups.
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
        selection_bias: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_per_token: int = 1,
        group_score: str = "top2_sum",
        group_loss_coef: float = 0.0,
        bias: bool = False,
        float32: bool | None = None,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize, self.scoring, self.scale = top_k, normalize, scoring, scale
        self.num_groups, self.groups_per_token, self.group_score = num_groups, groups_per_token, group_score
        self.group_loss_coef = group_loss_coef
        published = scoring == "sigmoid" or selection_bias or num_groups > 1
        self.float32 = published if float32 is None else float32
        self.takes_candidates = num_groups == 1  # a token's groups might hold too few of them
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        if selection_bias:
            self.e_score_correction_bias = torch.zeros(num_experts)

    @classmethod
    def check(cls, config: Any, *, normalize: bool, scoring: str, group_score: str, **options: Any) -> None:
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} is unknown; choose from {list(SCORINGS)}.")
        if scoring == "softmax_selected" and not normalize:
            raise ValueError("scoring='softmax_selected' is normalized by nature; normalize=False needs 'softmax'.")
        if group_score not in GROUP_SCORES:
            raise ValueError(f"group_score={group_score!r} is unknown; choose from {sorted(GROUP_SCORES)}.")
        if options["group_loss_coef"] and options["num_groups"] == 1:
            raise ValueError("group_loss_coef compares groups of experts: it needs num_groups of 2 or more.")

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        super().check_number(num_experts, spec)
        groups, kept = spec["num_groups"], spec["groups_per_token"]
        needed = 1 if groups == 1 else GROUP_SCORES.get(spec["group_score"], 1)
        if groups < 1 or num_experts % groups or num_experts // groups < needed:
            valid = [n for n in range(1, num_experts + 1) if num_experts % n == 0 and num_experts // n >= needed]
            raise ValueError(
                f"num_groups={groups} does not split {num_experts} experts into equal groups of {needed} or more "
                f"(group_score={spec['group_score']!r}); use one of {valid}."
            )
        if not 1 <= kept <= groups:
            raise ValueError(f"groups_per_token={kept}; with num_groups={groups} it must be 1 to {groups}.")
        if spec["top_k"] > (candidates := kept * num_experts // groups):
            raise ValueError(
                f"top_k={spec['top_k']} experts from {kept} of {groups} groups: a token has {candidates} candidates; "
                f"use top_k of 1 to {candidates}, or more groups_per_token."
            )

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        for offset in (self.bias, self.e_score_correction_bias):
            if offset is not None:
                init.zeros_(offset)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid() if self.scoring == "sigmoid" else super().scores(logits)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = self.logits(tokens)
        selected = self.scoring == "softmax_selected"
        scores = logits.float() if selected else self.scores(logits)
        if self.e_score_correction_bias is None:
            weights, indices = self.limit_to_groups(self.limit_to_candidates(scores, context)).topk(self.top_k, dim=-1)
        else:
            ranking = self.limit_to_candidates(scores + self.e_score_correction_bias, context)
            indices = self.limit_to_groups(ranking).topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, indices)
        if selected:
            weights = weights.softmax(-1)
        elif self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scale != 1:
            weights = weights * self.scale
        weights = weights.to(tokens.dtype if self.float32 else logits.dtype)
        if not (context.losses and self.group_loss_coef):
            return Routing(logits, weights, indices)
        loss = between_groups_loss(self.scores(logits), indices, weights, self.num_groups, context.token_mask)
        return Routing(logits, weights, indices, loss=self.group_loss_coef * loss)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, E) `W x + b`."""
        if not self.float32:
            return F.linear(tokens, self.weight, self.bias)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def limit_to_groups(self, ranking: torch.Tensor) -> torch.Tensor:
        """`ranking` (N, E) with -inf outside the best groups of each token."""
        if self.num_groups == 1:
            return ranking
        grouped = ranking.unflatten(-1, (self.num_groups, -1))  # (N, G, E / G)
        group_scores = grouped.topk(GROUP_SCORES[self.group_score], dim=-1).values.sum(-1)  # (N, G)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(self.groups_per_token, dim=-1).indices, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
