"""SMoE-Dropout's frozen router: a random linear map that is never trained (https://arxiv.org/abs/2303.01610).

    g = W x + b,   chosen = topk(g),   weights = softmax(g[chosen])

The number of experts per token grows during training; afterwards any number works, up to the dense model of all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class Frozen(Router):
    """Top-k over a frozen random map. `weight` (E, D) and `bias` (E,) are buffers: saved, but no optimizer sees them.

    They are drawn when the model is initialised, so the seed before that decides the routing for good. The gradient
    still flows through the weights to the tokens, as in the released code.

    Args:
        top_k: experts per token. The attribute of that name may be set between two forward passes:
            `hf_moe.training.TopKSchedule` lets it grow (the paper's 8 to 16 of 16, linearly), and at inference it says
            how much to compute.
    """

    scoring = "softmax_selected"
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, config: Any, layer_idx: int, num_experts: int, *, top_k: int = 2) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k = top_k
        self.register_buffer("weight", torch.empty(num_experts, config.hidden_size))
        self.register_buffer("bias", torch.empty(num_experts))

    def init_weights(self, std: float) -> None:
        """Uniform in +- 1 / sqrt(D), weight and bias: torch's default for a linear map, as in the released code."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight, self.bias)
        chosen, indices = logits.float().topk(self.top_k, dim=-1)
        return Routing(logits, chosen.softmax(-1).to(logits.dtype), indices)

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,) zeros: a router that cannot learn needs no balance loss."""
        return routing.logits.new_zeros(3, dtype=torch.float32)
