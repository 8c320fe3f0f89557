"""MoFME's feature-modulated experts (https://arxiv.org/abs/2312.16610; released code `RoyZry98/MoFME-Pytorch`).

    b = act(B_0 x) * B_1 x,   E_e(b) = (S_e b + s_e) * b + T_e b + t_e,   y = A_2 act(A_1 sum_e w_e E_e(b) + a_1) + a_2

One base network b (FiLM's features) serves all experts: an expert only scales and shifts it. What differs from the
released code, which is a vision model:

* There the base reads LayerNorm(x) and the router x itself; here both read what the block has normalised.
* There the loop over the experts starts one entry too early: expert 0 is the GELU and the last expert never runs.
* There is dropout in the adaptor A.

Letters: N tokens, D width, E experts, F width of the base, K chosen, S = N K rows.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..ops.grouped import GroupedRows
from .base import Experts


class FeatureModulated(Experts):
    """Experts that modulate the features of a network that they share. The adaptor mixes what all of them return, so
    a token's experts must be run together. The paper's router is `top_k` with scoring `softmax_selected`.

    Args:
        intermediate_size: width F of the base network; the paper's is D.
        adaptor_size: width of the adaptor between A_1 and A_2.
        activation: a key of Transformers' `ACT2FN`, in base and adaptor.
    """

    attribute = "modulating_experts"  # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU
    per_expert_names = {"modulation_proj": ("scale_proj", "shift_proj")}
    joint = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        intermediate_size: int,
        adaptor_size: int,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size)
        self.modulation_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, intermediate_size))
        self.modulation_bias = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size))
        self.adaptor_in_proj = nn.Linear(intermediate_size, adaptor_size)
        self.adaptor_out_proj = nn.Linear(adaptor_size, config.hidden_size)
        self.act_fn = ACT2FN[activation]

    @classmethod
    def check(cls, config: Any, *, activation: str, **options: Any) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.modulation_proj, std=std)
        init.zeros_(self.modulation_bias)

    def forward(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = GroupedRows(indices, self.num_experts, self.config._experts_implementation)
        features = self.act_fn(self.gate_proj(tokens)) * self.up_proj(tokens)  # (N, F)
        features = features.index_select(0, rows.token)  # (S, F)
        modulation = rows.linear(features, self.modulation_proj) + self.modulation_bias[rows.expert]
        scale, shift = modulation.chunk(2, dim=-1)
        mixed = rows.sum((scale * features + shift) * rows.order(weights)[:, None])  # (N, F)
        return self.adaptor_out_proj(self.act_fn(self.adaptor_in_proj(mixed.to(tokens.dtype)))).to(tokens.dtype)
