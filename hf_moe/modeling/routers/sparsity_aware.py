"""MoE-X's router without parameters: the experts that a token activates least (https://arxiv.org/abs/2503.07639).

    mu_e = m_e x,   sigma_e^2 = sum_i v_ei x_i^2,   share of active units ~ (1 + erf(mu_e / (sqrt(2) sigma_e))) / 2
    s_e = -erf(mu_e / (sqrt(2) sigma_e)),   chosen = topk(s),   weights = softmax(s[chosen])

m_e and v_e (D,) are mean and variance of each input's weight over the F hidden units of expert e.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class SparsityAware(Router):
    """Top-k by predicted sparsity; the gradient reaches the experts' first layer through its statistics.

    The prediction is about units that are active where their input is positive: ReLU's. Experts with a gate are judged
    by their gate. Statistics are taken anew in every forward pass, which reads the first layer of all E experts: that
    is little beside a batch of tokens, but more than the k experts themselves when decoding token by token.

    Args:
        top_k: experts per token; 2 of 8 in the paper.
        eps: added to sigma^2. The paper states neither it nor which variance it means; this is the population's.
    """

    scoring = "softmax_selected"
    reads_experts = True

    def __init__(self, config: Any, layer_idx: int, num_experts: int, *, top_k: int = 2, eps: float = 1e-6) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.eps = top_k, eps

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        assert context.experts is not None, "`Moe` hands over the experts"
        # called, not looked into: adapters, offloading and sharding put the weights in place around a call
        mean, variance = context.experts(tokens, None, None)
        with torch.autocast(tokens.device.type, enabled=False):
            inputs = tokens.float()
            if mean.shape[-1] > inputs.shape[-1]:  # a bias is the weight of an input that is always 1
                inputs = F.pad(inputs, (0, 1), value=1.0)
            spread = F.linear(inputs.square(), variance.float()) + self.eps
            logits = -torch.erf(F.linear(inputs, mean.float()) / (math.sqrt(2) * spread.sqrt()))  # (N, E)
        chosen, indices = logits.topk(self.top_k, dim=-1)
        return Routing(logits, chosen.softmax(-1).to(tokens.dtype), indices)
