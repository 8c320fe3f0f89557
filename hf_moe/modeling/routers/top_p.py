"""Dynamic routing: as many experts as a token needs (https://arxiv.org/abs/2403.07652).

P = softmax(W x), sorted downwards;   chosen = the first experts until their sum of P exceeds p, with the one that does
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class TopP(Router):
    """The fewest experts whose probabilities exceed p together; weights are the probabilities, not renormalised.

    With p = 1 that is every expert. Routings have a slot per expert; those in use come first.

    Args:
        p: 0 to 1; the released model has 0.4 with 16 experts.
        normalize: divide a token's weights by their sum; the released code does not.
        entropy_loss_coef: weight of `entropy_loss`, which keeps tokens from asking for ever more experts. We
            remember 1e-4 from the paper and could not check it: the released code has no losses.
    """

    varies = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        p: float = 0.4,
        normalize: bool = False,
        entropy_loss_coef: float = 1e-4,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.p, self.normalize, self.entropy_loss_coef = num_experts, p, normalize, entropy_loss_coef
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, p: float, **options: Any) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} is a probability; use 0 (the best expert alone) to 1 (all experts).")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        probabilities, indices = self.scores(logits).sort(dim=-1, descending=True)
        weights = probabilities
        if self.p < 1:  # at 1, rounding could hide the last experts behind a sum above 1
            before = probabilities.cumsum(-1) - probabilities
            used = before <= self.p
            used[:, 0] = True
            weights, indices = probabilities.where(used, 0), indices.where(used, 0)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        loss = self.entropy_loss_coef * entropy_loss(logits, context.token_mask) if context.losses else None
        return Routing(logits, weights.to(logits.dtype), indices, loss=loss)


def entropy_loss(logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean entropy `-sum_e P_e log P_e` of the tokens' routing, in nats (https://arxiv.org/abs/2403.07652).

    log E where all experts are equally likely, 0 where each token is sure of one, whether or not of the same.

    Args:
        logits: (N, E).
        token_mask: (N,) True for real tokens; None if all are.
    """
    log_probabilities = logits.float().log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    if token_mask is None:
        return entropy.mean()
    real = token_mask.to(entropy)
    return (entropy * real).sum() / real.sum().clamp(min=1)
