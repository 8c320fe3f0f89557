"""Compressed experts (https://arxiv.org/abs/2503.00634): a vector stands for an expert that matters little to a token.

Of the K experts of a token the m with the largest weights are main and run; the others, auxiliary, only modulate what
the main ones read. Two readings, neither checked against the authors' code (theta, c: (E, D), g the router's weights):

    normalized   y = sum_main g_i E_i(x * sum_aux a_j theta_j),    a = g / sum_aux g,  theta starts at 1
    additive     y = sum_main g_i E_i(x * (1 + sum_aux g_j c_j)),                      c starts at 0

Both start as the main experts alone. The paper's parameter count suggests vectors on the experts' inner side as well.
Letters: N tokens, D width, E experts, K chosen.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .swiglu import Swiglu

MODULATIONS = ("normalized", "additive")


class Compressed(Swiglu):  # pyright: ignore[reportGeneralTypeIssues] - the decorator's annotation
    """SwiGLU experts of which each also has a vector for the tokens that it is not a main expert of.

    Experts are stored like `swiglu`'s: a checkpoint of those lacks `modulation` only. A token with no more than m
    experts has none to compress. The main experts' weights stay as the router gives them.

    Args:
        intermediate_size: width F of one expert.
        num_main_experts: m, how many experts of each token run (the paper halves K: 1 of 2 in Phi-MoE, 4 of 8 in
            OLMoE).
        modulation: `normalized` or `additive`.
    """

    attribute = "compressed_experts"  # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU
    takes_rows = False
    tells_statistics = False  # its forward pass wants indices
    joint = True
    tp_plan, ep_plan = {}, {}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        intermediate_size: int,
        num_main_experts: int,
        modulation: str = "normalized",
    ) -> None:
        super().__init__(config, layer_idx, num_experts, intermediate_size=intermediate_size)
        self.num_main_experts, self.is_normalized = num_main_experts, modulation == "normalized"
        self.modulation = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, modulation: str, **options: Any) -> None:
        if modulation not in MODULATIONS:
            raise ValueError(f"modulation={modulation!r} is unknown; choose from {list(MODULATIONS)}.")

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        if not 1 <= spec["num_main_experts"] <= num_experts:
            raise ValueError(
                f"num_main_experts={spec['num_main_experts']}; with num_experts={num_experts} it must be 1 to "
                f"{num_experts}."
            )

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.constant_(self.modulation, 1.0 if self.is_normalized else 0.0)

    def forward(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        main_weights, main = weights.topk(min(self.num_main_experts, weights.shape[-1]), dim=-1)
        auxiliary = weights.scatter(-1, main, 0)  # (N, K)
        if self.is_normalized:
            total = auxiliary.sum(-1, keepdim=True)
            modulation = self.mix(indices, auxiliary / total.where(total != 0, 1))
            modulation = modulation.where(total != 0, 1)
        else:
            modulation = 1 + self.mix(indices, auxiliary)
        return super().forward(tokens * modulation.to(tokens.dtype), indices.gather(-1, main), main_weights)

    def mix(self, indices: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """(N, D) sum of the vectors of the experts (N, K), by shares (N, K)."""
        by_expert = shares.new_zeros(shares.shape[0], self.num_experts).scatter_add(1, indices, shares)  # (N, E)
        return by_expert @ self.modulation.to(shares.dtype)
