"""ProMoE's prototypical router: experts are found by cosine similarity (https://arxiv.org/abs/2510.24711).

    s_e = cos(p_e, x),   chosen = topk(s),   w_e = s_e, softmax(s)_e or sigmoid(s_e), not renormalised

A contrastive loss pulls each prototype p_e (D,) towards the mean of the tokens it got and away from the others' means.
ProMoE's own experts for unconditional images are not part of this: a language model has no such tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..losses import assignments, real_tokens
from .base import Router, Routing

PROTOTYPE_WEIGHTS = ("identity", "softmax", "sigmoid")


def prototype_contrastive_loss(
    prototypes: torch.Tensor, tokens: torch.Tensor, assigned: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    """ProMoE's routing contrastive loss: the mean over clusters i of `-log softmax_j(cos(p_i, m_j) / tau)_i`.

    m_j is the mean of the tokens of cluster j; clusters without tokens do not count. The gradient reaches prototypes
    and tokens, not the assignment. Prototypes that point at their own mean, with the others orthogonal, give
    `log(1 + (n - 1) exp(-1 / tau))`, about 0; n clusters with one mean give log n. With fewer than two clusters there
    is nothing to contrast: 0, so the loss does not see a total collapse.

    Args:
        prototypes: (E, D).
        tokens: (N, D).
        assigned: (N, E) 1 where a token belongs to a cluster, 0 elsewhere and for padding.
        temperature: tau.
    """
    sizes = assigned.sum(0)  # (E,)
    means = assigned.T @ tokens.float() / sizes.clamp(min=1)[:, None]
    similarity = F.normalize(prototypes.float(), dim=-1) @ F.normalize(means, dim=-1).T / temperature
    filled = sizes > 0
    own = (similarity.masked_fill(~filled, -1e9).logsumexp(-1) - similarity.diagonal()).where(filled, 0.0)
    return own.sum() / filled.sum().clamp(min=1)


class Prototype(Router):
    """Top-k by cosine similarity to learned prototypes `weight` (E, D).

    Args:
        top_k: experts per token; 1 of 12 in ProMoE.
        weighting: `identity` (the similarity itself), `softmax` over all experts, or `sigmoid`.
        temperature: tau of the contrastive loss.
        contrastive_loss_coef: weight of the contrastive loss, ProMoE's lambda; 0 turns it off.
        contrast_all: a token counts for the means of all its experts (ProMoE's runs), not of its first one only.
        initializer_range: standard deviation of the prototypes at the start.
    """

    normalize = False

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 1,
        weighting: str = "identity",
        temperature: float = 0.07,
        contrastive_loss_coef: float = 1.0,
        contrast_all: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.weighting, self.temperature = top_k, weighting, temperature
        self.contrastive_loss_coef, self.contrast_all = contrastive_loss_coef, contrast_all
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, weighting: str, temperature: float, **options: Any) -> None:
        if weighting not in PROTOTYPE_WEIGHTS:
            raise ValueError(f"weighting={weighting!r} is unknown; choose from {list(PROTOTYPE_WEIGHTS)}.")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=self.initializer_range)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.normalize(tokens.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T  # (N, E)
        chosen, indices = logits.topk(self.top_k, dim=-1)
        if self.weighting == "softmax":
            chosen = self.scores(logits).gather(1, indices)
        elif self.weighting == "sigmoid":
            chosen = chosen.sigmoid()
        loss = self.contrast(tokens, indices, context) if context.losses and self.contrastive_loss_coef else None
        return Routing(logits, chosen.to(tokens.dtype), indices, loss=loss)

    def contrast(self, tokens: torch.Tensor, indices: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The weighted contrastive loss of this call, without padding."""
        clusters = indices if self.contrast_all else indices[:, :1]
        empty = torch.zeros(tokens.shape[0], self.num_experts, device=tokens.device)
        assigned = assignments(empty, clusters, torch.ones_like(clusters, dtype=empty.dtype))
        mask = None if context.token_mask is None else context.token_mask.to(tokens.device)
        assigned = assigned * real_tokens(empty, mask)
        loss = prototype_contrastive_loss(self.weight, tokens, assigned, self.temperature)
        return self.contrastive_loss_coef * loss

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,) the contrastive loss alone: ProMoE trains without balance loss and z-loss."""
        own = routing.logits.new_zeros(()) if routing.loss is None else routing.loss
        return torch.stack([torch.zeros_like(own), torch.zeros_like(own), own])
