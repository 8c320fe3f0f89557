"""MoFME's uncertainty-aware router (https://arxiv.org/abs/2312.16610): EXPERIMENTAL, implemented from the idea.

The paper estimates a router's uncertainty by Monte Carlo dropout and normalises its scores by the covariance; the
released code has neither. Our reading, with dropout of probability p before the linear map g = W x:

    mean_e = (W x)_e,   sigma_e^2 = p / (1 - p) sum_i W_ei^2 x_i^2,   z_e = g_e / sigma_e,   weights from softmax(z)

sigma^2 is the exact variance of g_e under dropout (the diagonal of its covariance), so an expert that a few inputs
decide about counts less than one with the same logit that many agree on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class Uncertainty(Router):
    """Top-k over logits in units of their own standard deviation. Experimental.

    In training the probabilities are the average over `num_samples` dropout samples of the token; in evaluation they
    are those of the mean, so they need no sampling and are the same every time.

    Args:
        top_k: experts per token.
        normalize: divide the k probabilities by their sum.
        dropout: p, more than 0 and less than 1.
        num_samples: dropout samples M in training; the paper's 5. Each costs one more router product.
        eps: added to the variance.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: bool = True,
        dropout: float = 0.1,
        num_samples: int = 5,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize = top_k, normalize
        self.dropout, self.num_samples, self.eps = dropout, num_samples, eps
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, dropout: float, num_samples: int, **options: Any) -> None:
        if not 0 < dropout < 1:
            raise ValueError(f"dropout={dropout} must be more than 0 and less than 1: uncertainty is measured by it.")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        with torch.autocast(tokens.device.type, enabled=False):
            inputs, weight = tokens.float(), self.weight.float()
            variance = self.dropout / (1 - self.dropout) * F.linear(inputs.square(), weight.square())
            deviation = (variance + self.eps).sqrt()  # (N, E)
            logits = F.linear(inputs, weight) / deviation
            probabilities = self.scores(logits)
            if self.training:
                samples = [F.linear(F.dropout(inputs, self.dropout), weight) for _ in range(self.num_samples)]
                probabilities = torch.stack([self.scores(sample / deviation) for sample in samples]).mean(0)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(tokens.dtype), indices)
