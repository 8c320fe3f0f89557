"""Gated DeltaNet (https://arxiv.org/abs/2412.06464): a delta rule whose state forgets at one rate per head and token.

    S' = alpha_t S_{t-1},   S_t = S' + k_t beta_t (v_t - k_t^T S')^T,   o_t = S_t^T q_t / sqrt(K)
    log alpha_t = -exp(A_log) softplus(W_a x_t + dt_bias),   y = W_o (RMSNorm(o) * SiLU(W_g x))

The paper's §3.1 has alpha (I - beta k k^T) S + beta k v^T, the same thing. Letters: B batch, T time, D width, H value
heads, K key width, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.delta_rule import at_least_fp32
from .delta_mixer import DeltaMixer, init_decay


class GatedDeltaNet(DeltaMixer):
    """The layer of Qwen3-Next and OLMo-Hybrid, with fla's names; its state is H K V numbers in fp32.

    The paper's sizes are K H = 0.75 D and V H = 1.5 D.

    Args:
        num_heads: heads of queries and keys; by default the config's attention heads.
        num_value_heads: heads of values, a multiple of `num_heads`; by default as many.
        key_head_dim: K; by default the config's `head_dim`.
        value_head_dim: V; by default K.
        conv_kernel_size: width of the short convolutions.
        gated: multiply the normed output by SiLU(W_g x).
        allow_neg_eigval: beta in (0, 2), so that a state can also turn around.
    """

    tp_plan = DeltaMixer.tp_plan | {"a_proj": "replicate", "g_proj": "replicate"}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_heads: int | None = None,
        num_value_heads: int | None = None,
        key_head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_kernel_size: int = 4,
        gated: bool = True,
        allow_neg_eigval: bool = False,
    ) -> None:
        heads, widths = (num_heads, num_value_heads), (key_head_dim, value_head_dim)
        super().__init__(config, layer_idx, *heads, *widths, conv_kernel_size, allow_neg_eigval, gated, swish=True)
        self.a_proj = nn.Linear(config.hidden_size, self.num_value_heads, bias=False)
        if gated:
            self.g_proj = nn.Linear(config.hidden_size, self.value_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))

    def init_weights(self, std: float) -> None:
        init_decay(self.A_log, self.dt_bias, 0.01, 16)

    def log_decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rate = at_least_fp32(self.A_log).exp()
        return -rate * F.softplus(at_least_fp32(self.a_proj(hidden_states)) + at_least_fp32(self.dt_bias))

    def output_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_proj(hidden_states)
