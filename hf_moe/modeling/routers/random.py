"""THOR's stochastic experts: no gate, but a draw (https://arxiv.org/abs/2110.04260).

    training:   e ~ uniform(1 ... E), one draw per layer and forward pass;   y_n = E_e(x_n) for every token n

Nothing is learned, so there is nothing to balance. Two forward passes draw independently: what makes the experts agree
is the consistency loss of `ThorForCausalLM`.
"""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing

INFERENCES = ("token", "sequence", "all")


class Random(Router):
    """Draws its experts from torch's generator of the tokens' device, which `torch.manual_seed` sets.

    Args:
        top_k: experts drawn, without replacement, and averaged; 1 in the paper.
        inference: outside training, `token` draws for each token, `sequence` for each sequence (of a packed row too),
            `all` averages all experts. Draws differ from call to call, those of one cached sequence included: only
            `all` gives the same output twice. The released code, whose tokens come time first, draws for each time
            step where it says sentence; this is the paper's reading.
    """

    normalize = True
    spans_batch = True

    def __init__(
        self, config: Any, layer_idx: int, num_experts: int, *, top_k: int = 1, inference: str = "token"
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.inference = top_k, inference

    @classmethod
    def check(cls, config: Any, *, inference: str, **options: Any) -> None:
        if inference not in INFERENCES:
            raise ValueError(f"inference={inference!r} is unknown; choose from {list(INFERENCES)}.")

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        number = tokens.shape[0]
        if not self.training and self.inference == "all":
            indices = torch.arange(self.num_experts, device=tokens.device).expand(number, -1)
        elif self.training:
            indices = self.draw(1, tokens.device).expand(number, -1)
        else:
            indices = self.draw(number, tokens.device)
            if self.inference == "sequence":
                indices = indices[context.sequence_ids(tokens)]
        weights = tokens.new_full(indices.shape, 1 / indices.shape[1])
        return Routing(tokens.new_zeros(number, self.num_experts), weights, indices)

    def draw(self, rows: int, device: torch.device) -> torch.Tensor:
        """(rows, top_k) different experts of each row."""
        return torch.rand(rows, self.num_experts, device=device).topk(self.top_k, dim=-1).indices

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,) zeros: a uniform draw is balanced."""
        return routing.logits.new_zeros(3, dtype=torch.float32)
