"""Kimi Delta Attention (Kimi Linear, https://arxiv.org/abs/2510.26692): every channel of the state forgets by itself.

    S' = diag(alpha_t) S_{t-1},   S_t = S' + k_t beta_t (v_t - k_t^T S')^T,   o_t = S_t^T q_t / sqrt(K)
    softplus gate:  log alpha_t = -exp(A_log) softplus(f(x_t) + dt_bias)
    bounded gate:   log alpha_t = L sigmoid(exp(A_log) (f(x_t) + dt_bias)),  L = -5
    y = W_o (RMSNorm(o) * sigmoid(g(x)))

f and g are linear, in Kimi Linear of low rank. Letters: B batch, T time, D width, H value heads, K key width, V value
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.delta_rule import at_least_fp32
from .delta_mixer import DeltaMixer, init_decay

DECAY_GATES = ("softplus", "bounded")


class KimiDeltaAttention(DeltaMixer):
    """The layer of Kimi Linear, and with `gate="bounded", low_rank=False` that of Ling-3.

    Its state is H K V numbers in fp32. f is `f_b_proj(f_a_proj(x))`, or `f_b_proj` alone at full rank; g likewise.

    Args:
        num_heads: heads of queries and keys; by default the config's attention heads.
        num_value_heads: heads of values, a multiple of `num_heads`; by default as many.
        key_head_dim: K; by default the config's `head_dim`.
        value_head_dim: V; by default K.
        conv_kernel_size: width of the short convolutions.
        gate: how a channel forgets, `softplus` or `bounded`.
        lower_bound: L, the fastest log decay of the bounded gate.
        low_rank: f and g go through V numbers.
        gated: multiply the normed output by sigmoid(g(x)).
        gate_bias: a bias on g (fla's layer has one, Kimi Linear none).
        allow_neg_eigval: beta in (0, 2), so that a state can also turn around.
    """

    tp_plan = DeltaMixer.tp_plan | dict.fromkeys(("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"), "replicate")

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
        gate: str = "softplus",
        lower_bound: float = -5.0,
        low_rank: bool = True,
        gated: bool = True,
        gate_bias: bool = False,
        allow_neg_eigval: bool = False,
    ) -> None:
        heads, widths = (num_heads, num_value_heads), (key_head_dim, value_head_dim)
        super().__init__(config, layer_idx, *heads, *widths, conv_kernel_size, allow_neg_eigval, gated, swish=False)
        self.is_bounded, self.lower_bound = gate == "bounded", lower_bound
        size, decay_size = config.hidden_size, self.num_value_heads * self.key_head_dim
        rank = self.value_head_dim if low_rank else size
        self.f_a_proj = nn.Linear(size, rank, bias=False) if low_rank else nn.Identity()
        self.f_b_proj = nn.Linear(rank, decay_size, bias=False)
        if gated:
            self.g_a_proj = nn.Linear(size, rank, bias=False) if low_rank else nn.Identity()
            self.g_b_proj = nn.Linear(rank, self.value_size, bias=gate_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(decay_size))

    @classmethod
    def check(
        cls, config: Any, *, gate: str, lower_bound: float, gated: bool, gate_bias: bool, **options: Any
    ) -> None:
        super().check(config, **options)
        if gate not in DECAY_GATES:
            raise ValueError(f"gate={gate!r} is unknown; choose from {list(DECAY_GATES)}.")
        if lower_bound >= 0:
            raise ValueError(f"lower_bound={lower_bound} must be negative: it is the log of a decay; -5 is usual.")
        if gate_bias and not gated:
            raise ValueError("gate_bias=True is a bias of the output gate: set gated=True or leave gate_bias out.")

    def init_weights(self, std: float) -> None:
        # rates of a bounded gate begin at 1, as in fla: at 16 the sigmoid would be flat and f would not learn
        init_decay(self.A_log, self.dt_bias, 1, 1 if self.is_bounded else 16)

    def log_decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = at_least_fp32(self.f_b_proj(self.f_a_proj(hidden_states))) + at_least_fp32(self.dt_bias)
        inputs, rate = inputs.unflatten(-1, (-1, self.key_head_dim)), at_least_fp32(self.A_log).exp()[:, None]
        return self.lower_bound * (rate * inputs).sigmoid() if self.is_bounded else -rate * F.softplus(inputs)

    def output_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states))
