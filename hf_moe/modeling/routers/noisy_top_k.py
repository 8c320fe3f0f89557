"""Noisy top-k gating (https://arxiv.org/abs/1701.06538, §2.1), with LLaMA-MoE's gate network
(https://arxiv.org/abs/2406.16554).

    c = W x  or  W_2 tanh(W_1 x),   s = softplus(W_noise x) + eps
    logits = c + s z,   z ~ N(0, 1) in training only
    chosen = topk(logits),   w = scale softmax(logits[chosen])
    P_e = Phi((c_e - the k-th best logit among the other experts) / s_e)     chance of e, were its noise drawn anew
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing

NETWORKS = ("linear", "mlp")


class NoisyTopK(Router):
    """The k best of noisy logits, weighed by a softmax over these k.

    `router_balance_loss="importance_load"` is the loss that belongs to it; the chances P are its differentiable load.
    LLaMA-MoE's code takes an expert for a chosen one where its noise alone, not its noisy logit, is above the others'
    k-th best; here P is the formula of Shazeer et al. (eq. 8 and 9), whose sum the two share otherwise.

    Args:
        top_k: experts per token.
        network: what the logits come from: `linear`, or `mlp` with one hidden layer of E units.
        noise: add noise in training, of a learned scale that starts at softplus(0) + `noise_epsilon`.
        noise_epsilon: the smallest standard deviation of the noise.
        scale: multiplies the weights at the end. LLaMA-MoE's models have E / K, so that at first the outputs are
            about as large as those of the dense layer that was split.
    """

    scoring = "softmax_selected"

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 2,
        network: str = "linear",
        noise: bool = True,
        noise_epsilon: float = 0.01,
        scale: float = 1.0,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.noise_epsilon, self.scale = top_k, noise_epsilon, scale
        size = config.hidden_size
        self.gate_network: nn.Module = nn.Linear(size, num_experts, bias=False)
        if network == "mlp":
            self.gate_network = nn.Sequential(
                self.gate_network, nn.Tanh(), nn.Linear(num_experts, num_experts, bias=False)
            )
        self.weight_noise = nn.Linear(size, num_experts, bias=False) if noise else None

    @classmethod
    def check(cls, config: Any, *, network: str, noise_epsilon: float, **options: Any) -> None:
        if network not in NETWORKS:
            raise ValueError(f"network={network!r} is unknown; choose from {list(NETWORKS)}.")
        if noise_epsilon <= 0:
            raise ValueError(f"noise_epsilon={noise_epsilon} is a standard deviation; use a number above 0.")

    def init_weights(self, std: float) -> None:
        if self.weight_noise is not None:
            init.zeros_(self.weight_noise.weight)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits, chances = self.gate_network(tokens), None
        if self.training and self.weight_noise is not None:
            clean, spread = logits, F.softplus(self.weight_noise(tokens)) + self.noise_epsilon
            logits = clean + torch.randn_like(clean) * spread
            chances = self.chances(clean, spread, logits) if self.top_k < self.num_experts else None
        best, indices = logits.topk(self.top_k, dim=-1)
        weights = best.float().softmax(-1) * self.scale
        return Routing(logits, weights.to(logits.dtype), indices, chances=chances)

    def chances(self, clean: torch.Tensor, spread: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """P (N, E) in fp32; gradient flows through the two thresholds as well."""
        clean, spread, logits = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (clean, spread, logits))
        best = logits.topk(self.top_k + 1, dim=-1).values
        last_in, first_out = best[:, -2:].unbind(-1)  # an expert that is in competes with the first that is out
        is_in = logits > first_out[:, None]
        return torch.special.ndtr((clean - torch.where(is_in, first_out[:, None], last_in[:, None])) / spread)
