"""Monet's router: every head scores two sides of n keys, whose pairs name n^2 experts (https://arxiv.org/abs/2412.04139).

    z = W x (H, n) of one side,   kept where BN(z_h) >= min(max BN(z_h), t),   g_h = softmax of the kept z_h
    t = Phi^-1(1 - k / n):   about k of n keys per head and token, and always one.

The weight of expert (i, j) is `sum_h g1_hi g2_hj`, which nobody forms. Letters: N tokens, D width, H heads, n keys of
a side. Formulas are those of the paper (§3) and of the public code (dmis-lab/Monet, `modeling_monet.py`), whose names
of weights and buffers these are. The public code has no losses: those are the paper's eq. 16 and 17.
"""

from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..losses import real_tokens
from ..ops.head_batch_norm import HeadBatchNorm
from .base import Router, Routing

NOT_KEPT = -1e10  # the public code's logit of a key that was not kept: its probability is exactly 0
LEAST_MEAN = torch.finfo(torch.float32).eps  # a key that nobody chose has no finite logarithm, and no gradient either


class MonetRouter(Router):
    """`forward(tokens (N, D)) -> Routing` over the 2 H n keys: side, then head, then key.

    `logits` are those of the kept keys and -1e10; `weights` and `state` their softmax per side and head, which is the
    public code's `router_probs`. Projections run in the model's dtype, everything behind them in fp32.
    """

    varies = True
    normalize = False
    spans_batch = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_keys: int,
        num_heads: int,
        top_k: int,
        momentum: float,
        uniformity_loss_coef: float,
        ambiguity_loss_coef: float,
    ) -> None:
        super().__init__(config, layer_idx, 2 * num_heads * num_keys)
        self.num_keys, self.num_heads, self.top_k = num_keys, num_heads, 2 * num_heads * top_k  # on average
        self.uniformity_loss_coef, self.ambiguity_loss_coef = uniformity_loss_coef, ambiguity_loss_coef
        self.threshold = NormalDist().inv_cdf(1 - top_k / num_keys) if top_k < num_keys else -float("inf")
        self.w1 = nn.Linear(config.hidden_size, num_heads * num_keys, bias=False)
        self.w2 = nn.Linear(config.hidden_size, num_heads * num_keys, bias=False)
        self.norm1 = HeadBatchNorm(num_heads, momentum)
        self.norm2 = HeadBatchNorm(num_heads, momentum)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        sides = ((self.w1, self.norm1), (self.w2, self.norm2))
        logits = torch.stack([self.side(tokens, *side, context.token_mask) for side in sides], dim=1)  # (N, 2, H, n)
        probabilities = logits.softmax(-1)
        loss = self.own_loss(probabilities, context.token_mask) if context.losses else None
        weights = probabilities.flatten(1).to(tokens.dtype)
        indices = torch.arange(self.num_experts, device=tokens.device).expand_as(weights)
        return Routing(logits.flatten(1), weights, indices, weights, loss)

    def side(
        self, tokens: torch.Tensor, projection: nn.Linear, norm: HeadBatchNorm, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(N, H, n) logits of one side, -1e10 where a key is not kept."""
        logits = projection(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(-1, (self.num_heads, -1))
        with torch.no_grad():
            normed = norm(logits, token_mask)
            dropped = normed < normed.amax(-1, keepdim=True).clamp(max=self.threshold)
        return logits.masked_fill(dropped, NOT_KEPT)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().unflatten(-1, (2, self.num_heads, -1)).softmax(-1).flatten(1)

    def own_loss(self, probabilities: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Both losses of the paper by their coefficients."""
        uniformity = self.uniformity_loss_coef * uniformity_loss(probabilities, token_mask)
        return uniformity + self.ambiguity_loss_coef * ambiguity_loss(probabilities, token_mask)

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,): the paper has neither a balance loss over experts nor a z-loss; its own two instead."""
        assert routing.loss is not None
        return torch.stack([torch.zeros_like(routing.loss)] * 2 + [routing.loss])

    def count(self, routing: Routing, context: ForwardContext) -> None:
        """Nothing: no loss of these reads `loads`."""


def uniformity_loss(probabilities: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`-1/(2 H n) sum log mean_tokens g` (eq. 16): log n if all keys are used alike, 15.9 (n - 1) / n if each head
    always uses one. The paper writes g, which is 0 for most keys of a token; its values (6.28 to 6.43 at n = 512, and
    log 512 is 6.24) are those of means. A mean counts as 1.2e-7 at least.

    Args:
        probabilities: (N, 2, H, n).
        token_mask: (N,) True for real tokens; None if all are.
    """
    return -token_mean(probabilities, token_mask).clamp(min=LEAST_MEAN).log().mean()


def ambiguity_loss(probabilities: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`1 - max_i g_hi` (eq. 17), the mean over tokens, sides and heads: 0 if every head chooses one key, 1 - 1/n if it
    weighs all alike, whatever the balance between keys.

    Args:
        probabilities: (N, 2, H, n).
        token_mask: (N,) True for real tokens; None if all are.
    """
    return 1 - token_mean(probabilities.amax(-1), token_mask).mean()


def token_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens of (N, ...)."""
    real = real_tokens(values, None if token_mask is None else token_mask.to(values.device)).squeeze(1)
    return torch.tensordot(real, values, 1) / real.sum().clamp(min=1)
