"""SparseMixer: experts are picked one after the other, each against its near rivals only.

GRIN (https://arxiv.org/abs/2409.12136; Phi-3.5-MoE) draws them in training and estimates the gradient of the draw;
Uni-MoE-2.0 (https://arxiv.org/abs/2511.12609) lets their number follow the token and adds experts for every token.

    at each pick:   rivals = {e left: (max - l_e) / max(|l_e|, |max|) <= 2 jitter},   w = softmax over the rivals
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class SparseMixer(Router):
    """Defaults are GRIN's. Uni-MoE-2.0 is `top_p=0.7, top_k=<all>, sample=False, normalize=True` with one null expert
    of the feed-forward (`num_zero_experts=1, zero_expert_type="null"`) and its shared experts as `always_experts`.

    The balance loss is Switch's over the experts that may be picked. Uni-MoE's code takes a softmax over those that a
    token did pick instead, and counts assignments per token.

    Args:
        top_k: picks per token; with `top_p` the most.
        top_p: make as many picks as the token needs experts until their softmax reaches this sum; None for `top_k`.
        jitter: how far below the best a rival may be, halved and relative.
        sample: in training, draw each pick from its rivals' softmax (Gumbel noise). A pick that is not the best is
            scaled down to 1/3 in three of four draws, which makes the gradient Heun's third-order estimate.
        normalize: divide the weights of a token by their sum (Uni-MoE; a null expert counts).
        always_experts: so many of the experts with parameters, the last ones, are used by every token. They take part
            in one softmax with the picked experts, whose weights are scaled to their share of it.
    """

    varies = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 2,
        top_p: float | None = None,
        jitter: float = 0.01,
        sample: bool = True,
        normalize: bool = False,
        always_experts: int = 0,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.picks, self.top_k, self.top_p, self.jitter = top_k, top_k + always_experts, top_p, jitter
        self.sample, self.normalize, self.always_experts = sample, normalize, always_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, top_p: float | None, jitter: float, **options: Any) -> None:
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} is a sum of probabilities; use one above 0 and up to 1, or None.")
        if jitter < 0:
            raise ValueError(f"jitter={jitter} is a distance; use 0 (no rivals but equals) or more.")

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        always = spec["always_experts"]
        if not 0 <= always < num_experts:
            raise ValueError(f"always_experts={always}; with {num_experts} experts it must be 0 to {num_experts - 1}.")
        super().check_number(num_experts - always, spec)

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        end = self.num_experts - self.num_zero_experts
        always = torch.arange(end - self.always_experts, end, device=tokens.device)
        left = logits.float().index_fill(1, always, float("-inf"))
        weights, indices = self.pick(left)
        if self.top_p is not None:
            reached = left.softmax(-1).sort(dim=-1, descending=True).values.cumsum(-1) < self.top_p
            idle = torch.arange(self.picks, device=tokens.device) > reached.sum(-1, keepdim=True)  # (N, K)
            weights, indices = weights.masked_fill(idle, 0), indices.masked_fill(idle, 0)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        if self.always_experts:
            always = always.expand(tokens.shape[0], -1)
            picked = logits.float().gather(1, indices).masked_fill(weights.detach() == 0, float("-inf"))
            joint = torch.cat([picked, logits.float().gather(1, always)], dim=-1).softmax(-1)  # (N, K + S)
            share = joint[:, : self.picks].sum(-1, keepdim=True)
            weights = torch.cat([weights * share, joint[:, self.picks :]], dim=-1)
            indices = torch.cat([indices, always], dim=-1)
        return Routing(logits, weights.to(logits.dtype), indices)

    def pick(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices (N, picks) of all picks, in their order, from the logits (N, E)."""
        weights, indices, logits = [], [], left
        for _ in range(self.picks):
            with torch.no_grad():
                largest = left.max(-1, keepdim=True).values
                far = (largest - logits) / logits.abs().maximum(largest.abs()) > 2 * self.jitter
            rivals = left.masked_fill(far, float("-inf"))
            probabilities = rivals.softmax(-1)
            if self.sample and self.training:
                index = (rivals - torch.empty_like(rivals).exponential_().log()).argmax(-1, keepdim=True)
                weight = probabilities.gather(1, index)
                best = index == probabilities.argmax(-1, keepdim=True)
                full = best | (torch.rand_like(weight) > 0.75)
                weight = weight - (2 / 3 * weight * ~full).detach()  # the gradient does not see the scaling
            else:
                index = left.argmax(-1, keepdim=True)
                weight = probabilities.gather(1, index)
            weights.append(weight)
            indices.append(index)
            left = left.scatter(1, index, float("-inf"))
        return torch.cat(weights, dim=-1), torch.cat(indices, dim=-1)

    def wanted_losses(self, routing: Routing, context: ForwardContext) -> torch.Tensor | None:
        """Without the experts that every token uses: they cannot be balanced."""
        if not self.always_experts:
            return super().wanted_losses(routing, context)
        end = self.num_experts - self.num_zero_experts
        first = end - self.always_experts
        indices = routing.indices[:, : self.picks]
        indices = indices.where(indices < end, indices - self.always_experts)
        logits = torch.cat([routing.logits[:, :first], routing.logits[:, end:]], dim=-1)
        return super().wanted_losses(Routing(logits, routing.weights[:, : self.picks], indices), context)
