"""Experts without a gate, as in Switch Transformer (https://arxiv.org/abs/2101.03961) and most early mixtures."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from ..ops.grouped import GroupedRows
from .base import Experts, unit_statistics
from .swiglu import RowsInterface


@use_experts_implementation(experts_interface=RowsInterface(), has_gate=False)
class MlpExperts(Experts):
    """`E_e(x) = W_down,e act(W_up,e x + b_up,e) + b_down,e`.

    Args:
        intermediate_size: width F of one expert.
        activation: a key of Transformers' `ACT2FN`: `relu` (Switch, MoE-X), `gelu`, `relu2` (Nemotron-H) ...
        bias: biases b_up and b_down (FastMoE's experts have them, Switch's do not).
    """

    # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU; and the loader's pattern for those,
    # "mlp.experts", also matches `mlp_experts`
    attribute = "ungated_experts"
    takes_rows = tells_statistics = True
    per_expert_names = {name: (name,) for name in ("up_proj", "down_proj")}
    tp_plan = {"up_proj": "colwise", "down_proj": "rowwise", "": "moe_tp_experts"}
    ep_plan = {"up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        intermediate_size: int,
        activation: str = "relu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, intermediate_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, intermediate_size)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.act_fn = ACT2FN[activation]

    @property
    def has_bias(self) -> bool:
        """Whether Transformers' kernels add biases."""
        return self.up_proj_bias is not None

    @has_bias.setter
    def has_bias(self, value: bool) -> None:
        """Transformers' decorator sets one value for the whole class; here it is an option of each instance."""

    @classmethod
    def check(cls, config: Any, *, activation: str, **options: Any) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        return {} if options["bias"] else super().plan(name, **options)  # each shard would add b_down once more

    def init_weights(self, std: float) -> None:
        init.normal_(self.up_proj, std=std)
        init.normal_(self.down_proj, std=std)
        if self.up_proj_bias is not None and self.down_proj_bias is not None:
            init.zeros_(self.up_proj_bias)
            init.zeros_(self.down_proj_bias)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The `eager` implementation: one expert after the other."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            up_bias = None if self.up_proj_bias is None else self.up_proj_bias[expert]
            down_bias = None if self.down_proj_bias is None else self.down_proj_bias[expert]
            hidden = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert], up_bias))
            rows = F.linear(hidden, self.down_proj[expert], down_bias) * top_k_weights[token, slot, None]
            output.index_add_(0, token, rows.to(output.dtype))
        return output

    def first_layer_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        bias = self.up_proj_bias
        return unit_statistics(self.up_proj if bias is None else torch.cat([self.up_proj, bias[..., None]], -1))

    def run_rows(
        self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Listed rows by grouped matrix products: each row is gathered once and added to its token once."""
        rows = GroupedRows(indices, self.num_experts, "grouped_mm", token)
        hidden = rows.linear(tokens.index_select(0, rows.token), self.up_proj)
        if self.up_proj_bias is not None:
            hidden = hidden + self.up_proj_bias[rows.expert]
        output = rows.linear(self.act_fn(hidden), self.down_proj)
        if self.down_proj_bias is not None:
            output = output + self.down_proj_bias[rows.expert]
        return rows.sum(output * rows.order(weights)[:, None], tokens.shape[0]).to(tokens.dtype)
