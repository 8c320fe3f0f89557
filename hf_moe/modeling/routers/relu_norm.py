"""BlockFFN's router: every expert whose logit is positive (https://arxiv.org/abs/2507.08771).

A0 = W x,   A1 = ReLU(A0),   weights = gamma A1 / rms(A1), the root mean square over all E experts
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class ReluNorm(Router):
    """A differentiable choice: an expert is used where ReLU is positive. Two losses make it sparse, none balances it.

    Args:
        eps: added to the mean square. A token without a positive logit uses no expert.
        activation_locality_loss_coef: weight of `activation_locality_loss`: the paper's 2e-3 (1e-3 for 1.2B).
        chunk_sparsification_loss_coef: weight of `chunk_sparsification_loss`, where the paper starts: its training
            script then adapts it. An attribute, so that a callback can.
        chunk_size: tokens of a chunk.
    """

    varies = True
    scoring = "relu"
    normalize = False

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        eps: float = 1e-6,
        activation_locality_loss_coef: float = 2e-3,
        chunk_sparsification_loss_coef: float = 5e-2,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.eps, self.chunk_size = num_experts, eps, chunk_size
        self.activation_locality_loss_coef = activation_locality_loss_coef
        self.chunk_sparsification_loss_coef = chunk_sparsification_loss_coef
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.norm_weight = nn.Parameter(torch.empty(num_experts))

    @classmethod
    def check(cls, config: Any, *, chunk_size: int, **options: Any) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: a chunk has at least 1 token.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.ones_(self.norm_weight)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().relu()

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        active = self.scores(logits)
        weights = self.norm_weight * active * torch.rsqrt(active.square().mean(-1, keepdim=True) + self.eps)
        indices = torch.arange(self.num_experts, device=tokens.device).expand(tokens.shape[0], -1)
        loss = None
        if context.losses:
            sequences = context.sequence_ids(tokens)
            real = torch.ones_like(sequences) if context.token_mask is None else context.token_mask.to(sequences)
            locality = activation_locality_loss(logits, sequences, real)
            chunks = chunk_sparsification_loss(active, sequences, real, self.chunk_size)
            loss = self.activation_locality_loss_coef * locality + self.chunk_sparsification_loss_coef * chunks
        return Routing(logits, weights.to(logits.dtype), indices, loss=loss)

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,): no balance loss and no z-loss, which BlockFFN has not, and its own two."""
        own = routing.logits.new_zeros((), dtype=torch.float32) if routing.loss is None else routing.loss
        return torch.stack([torch.zeros_like(own), torch.zeros_like(own), own])


def activation_locality_loss(
    logits: torch.Tensor, sequences: torch.Tensor, real: torch.Tensor, sharpness: float = 100.0
) -> torch.Tensor:
    """Neighbouring tokens should use the same experts (https://arxiv.org/abs/2507.08771).

    The mean, over experts and neighbours (t-1, t) of a sequence, of BCE(sigmoid(c A0[t-1]), sigmoid(c A0[t])), where
    gradient flows through both. 0 where neighbours agree and are sure; c |A0| for each expert on which they do not.

    Args:
        logits: (N, E) A0.
        sequences: (N,) which sequence each token is of.
        real: (N,) 1 for a token, 0 for padding.
        sharpness: c; the paper's 100 makes sigmoid almost a step.
    """
    sharp = sharpness * logits.float()
    pairs = ((sequences[1:] == sequences[:-1]) & (real[1:] * real[:-1] != 0)).to(sharp)  # (N - 1,)
    loss = F.binary_cross_entropy_with_logits(sharp[:-1], sharp[1:].sigmoid(), reduction="none").mean(-1)
    return (loss * pairs).sum() / pairs.sum().clamp(min=1)


def chunk_sparsification_loss(
    active: torch.Tensor, sequences: torch.Tensor, real: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """The tokens of a chunk should use few experts together (https://arxiv.org/abs/2507.08771).

    With p = A1 / sum_e A1: the mean, over chunks of consecutive real tokens of a sequence and over experts, of
    `1 - prod_t (1 - p_te)`. `1 - (1 - 1/E)^L` where L tokens spread evenly, 1/E if
    all of them use one expert.

    Args:
        active: (N, E) A1 in fp32.
        sequences: (N,) the number of the token with which each token's sequence starts.
        real: (N,) 1 for a token, 0 for padding.
        chunk_size: L; the last chunk of a sequence may be shorter.
    """
    share = active / (active.sum(-1, keepdim=True) + 1e-5) * real[:, None]
    before = real.cumsum(0) - real  # real tokens before this one
    chunk = sequences + (before - before[sequences]) // chunk_size * chunk_size  # its number: below N, one of its own
    log_unused = torch.zeros_like(share).index_add(0, chunk, torch.log1p(1e-5 - share))
    exists = torch.zeros_like(real).index_add(0, chunk, real).clamp(max=1)  # (N,)
    used = (1 - log_unused.exp()).mean(-1)
    return (used * exists).sum() / exists.sum().clamp(min=1)
