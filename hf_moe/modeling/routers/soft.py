"""Soft routing: every expert works on every token, mixed by a softmax gate (BAM's attention experts)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class Soft(Router):
    """`weights = softmax(W x)` over all experts; nothing is dropped, so there is nothing to balance."""

    def __init__(self, config: Any, layer_idx: int, num_experts: int) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        logits = F.linear(tokens, self.weight)
        indices = torch.arange(self.num_experts, device=tokens.device).expand(tokens.shape[0], -1)
        return Routing(logits, self.scores(logits).to(logits.dtype), indices)

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,) zeros: soft routing cannot be unbalanced (BAM, §3)."""
        return routing.logits.new_zeros(3, dtype=torch.float32)
