"""SwiGLU experts as stacked 3-D weights, run by whichever kernel `experts_implementation` names."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from ..ops.grouped import GroupedRows
from .base import Experts, unit_statistics


class RowsInterface(ExpertsInterface):
    """Transformers' kernels, and what they do not know: listed rows, statistics of the weights."""

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        kernel = super().get_interface(experts_implementation, default)

        def run(experts: Any, tokens: Any, indices: Any, weights: Any, token: Any = None) -> torch.Tensor:
            if indices is None:
                return experts.first_layer_statistics()
            if token is None:
                return kernel(experts, tokens, indices, weights)
            if experts_implementation == "grouped_mm" and not experts._is_expert_parallel:
                return experts.run_rows(tokens, indices, weights, token)
            rows = kernel(experts, tokens.index_select(0, token), indices, weights)
            return tokens.new_zeros(tokens.shape).index_add(0, token, rows)

        return run


@use_experts_implementation(experts_interface=RowsInterface())
class Swiglu(Experts):
    """`E_e(x) = W_down,e (act(W_gate,e x) * W_up,e x)`, with gate and up fused: Mixtral's and Qwen3-MoE's layout.

    Args:
        intermediate_size: width F of one expert.
    """

    takes_rows = tells_statistics = True
    per_expert_names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    tp_plan = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "": "moe_tp_experts"}
    ep_plan = {"gate_up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}

    def __init__(self, config: Any, layer_idx: int, num_experts: int, *, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def init_weights(self, std: float) -> None:
        init.normal_(self.gate_up_proj, std=std)
        init.normal_(self.down_proj, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The `eager` implementation: one expert after the other. Never train on it: each step of the backward pass
        fills a full-size gradient per expert."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (expert_output * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    def first_layer_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        return unit_statistics(self.gate_up_proj.chunk(2, dim=1)[0])

    def run_rows(
        self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Listed rows by grouped matrix products: each row is gathered once and added to its token once."""
        rows = GroupedRows(indices, self.num_experts, "grouped_mm", token)
        gate, up = rows.linear(tokens.index_select(0, rows.token), self.gate_up_proj).chunk(2, dim=-1)
        output = rows.linear(self.act_fn(gate) * up, self.down_proj) * rows.order(weights)[:, None]
        return rows.sum(output, tokens.shape[0]).to(tokens.dtype)
