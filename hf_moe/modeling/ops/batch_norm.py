"""Batch normalisation over the real tokens of a forward pass (https://arxiv.org/abs/1502.03167)."""

import torch
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..parts import Part
from .recomputation import is_recomputed


class TokenBatchNorm(Part):
    """`y = weight (x - mean) / sqrt(var + eps) + bias`, entry by entry: (N, F) -> (N, F), computed in fp32.

    In training the mean and the biased variance are those of this forward's tokens on this process, without padding;
    they also move the running ones (the variance unbiased) by `momentum`, which evaluation uses. A forward pass that
    checkpointing repeats moves nothing.
    """

    spans_batch = True
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def init_weights(self, std: float) -> None:
        for ones, zeros in ((self.weight, self.bias), (self.running_var, self.running_mean)):
            init.ones_(ones)
            init.zeros_(zeros)

    def forward(self, tokens: torch.Tensor, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        precise = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self.training:
            mean, variance = self.statistics(precise, context.token_mask)
        else:
            mean, variance = self.running_mean, self.running_var
        normed = (precise - mean) * (variance + self.eps).rsqrt()
        return (normed * self.weight + self.bias).to(tokens.dtype)

    def statistics(self, tokens: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance (F,) of the real tokens."""
        real = tokens.new_ones(tokens.shape[0], 1)
        if token_mask is not None:
            real = token_mask[:, None].to(tokens)
        count = real.sum().clamp(min=1)
        mean = (tokens * real).sum(0) / count
        variance = ((tokens - mean).square() * real).sum(0) / count
        if not is_recomputed():
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance
