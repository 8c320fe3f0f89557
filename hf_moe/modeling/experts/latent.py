"""MoLE's latent experts: a group of experts shares its input projection (https://arxiv.org/abs/2503.23100).

Expert e of group g:   E_e(x) = W_down,e [act(A_gate,e B_gate,g x) * (A_up,e B_up,g x)]

B (L, D) is shared inside the group, A (F, L) private. With `factorize_down` (the paper's second version, MoLAE) the
output is factored too: W_down,e = P_g A_down,e, P (D, L).
Letters: N tokens, D width, E experts, G groups, L latent size, F expert width, K chosen, S = N K rows.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..ops.grouped import GroupedRows
from .base import Experts


class Latent(Experts):
    """Experts that work in a latent space shared inside their group. B x is computed once per group and token.

    Args:
        intermediate_size: width F of one expert.
        latent_size: width L of the latent space. The paper's abstract reads as L = F; a free L contains that case.
        experts_per_group: how many consecutive experts share B.
        factorize_down: also factor the output side.
    """

    attribute = "latent_experts"  # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU
    takes_rows = True
    per_expert_names = {name: (name,) for name in ("gate_proj", "up_proj", "down_proj")}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        intermediate_size: int,
        latent_size: int,
        experts_per_group: int,
        factorize_down: bool = False,
    ) -> None:
        super().__init__()
        width, groups = config.hidden_size, num_experts // experts_per_group
        self.config, self.num_experts, self.experts_per_group = config, num_experts, experts_per_group
        self.gate_latent_proj = nn.Parameter(torch.empty(groups, latent_size, width))
        self.up_latent_proj = nn.Parameter(torch.empty(groups, latent_size, width))
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, latent_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, latent_size))
        output_size = latent_size if factorize_down else width
        self.down_proj = nn.Parameter(torch.empty(num_experts, output_size, intermediate_size))
        self.down_latent_proj = nn.Parameter(torch.empty(groups, width, latent_size)) if factorize_down else None
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        per_group = spec["experts_per_group"]
        if per_group < 1 or num_experts % per_group:
            valid = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
            raise ValueError(
                f"experts_per_group={per_group} does not divide num_experts={num_experts}; use one of {valid}."
            )

    def init_weights(self, std: float) -> None:
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, std=std)

    def forward(
        self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, token: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = GroupedRows(indices, self.num_experts, self.config._experts_implementation, token)
        row_group = rows.expert // self.experts_per_group  # (S,)
        gate, up = (
            rows.linear(torch.einsum("nd,gld->ngl", tokens, shared)[rows.token, row_group], private)
            for shared, private in ((self.gate_latent_proj, self.gate_proj), (self.up_latent_proj, self.up_proj))
        )
        output = rows.linear(self.act_fn(gate) * up, self.down_proj) * rows.order(weights)[:, None]  # (S, D or L)
        if self.down_latent_proj is None:
            return rows.sum(output, tokens.shape[0]).to(tokens.dtype)
        groups = self.down_latent_proj.shape[0]
        latent = output.new_zeros(tokens.shape[0] * groups, output.shape[-1])
        latent = latent.index_add(0, rows.token * groups + row_group, output).view(tokens.shape[0], groups, -1)
        return torch.einsum("ngl,gdl->nd", latent, self.down_latent_proj).to(tokens.dtype)
