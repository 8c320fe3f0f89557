"""Mamba-2 (https://arxiv.org/abs/2405.21060, section 7; Hunyuan-TurboS, https://arxiv.org/abs/2505.15431).

    [z, u, dt] = W_in h,   [x, B, C] = silu(conv(u)),   dt = softplus(dt + dt_bias),
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T,   o_t = S_t^T C_t + D x_t,   y = W_out RMSNorm(o o silu(z))

Parameters are those of Transformers' `Mamba2Mixer` and `NemotronHMamba2Mixer`, by name and layout, so that their
checkpoints load; the computation is ours, for theirs can neither be padded on the right, packed nor rolled back.

Letters: B batch, T time, H heads, P head width, G groups, N state size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..layers import GroupRMSNorm
from ..ops.convolution import CausalConv1d
from ..ops.linear_attention import linear_attention
from ..packing import Rows
from .recurrent_mixer import RecurrentMixer

TIME_STEPS = (0.001, 0.1)  # dt at initialization, log-uniform; at least 1e-4


class Mamba2(RecurrentMixer):
    """Linear attention that each token makes forget by its own step dt; the state is H N P numbers in float32.

    Args:
        num_heads: H; defaults to 2 hidden sizes of channels (Mamba's expansion by 2) in heads of `head_dim`.
        head_dim: P.
        state_size: N, width of the keys B and queries C.
        num_groups: G; H / G consecutive heads share B and C, and the output is normalized in G parts.
        conv_kernel: width of the convolution.
        bias: biases on the two projections.
        conv_bias: a bias on the convolution.
        min_time_step: lower limit of dt: 0 for Mamba-2, 0.001 for Nemotron-H.
        max_time_step: upper limit of dt; None for none.
    """

    tp_plan = {"in_proj": "replicate", "out_proj": "replicate"}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_kernel: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        min_time_step: float = 0.0,
        max_time_step: float | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = num_heads or 2 * config.hidden_size // head_dim
        self.head_dim, self.state_size, self.num_groups = head_dim, state_size, num_groups
        self.time_step_limit = (min_time_step, max_time_step)
        width, keys = self.num_heads * head_dim, num_groups * state_size
        self.splits = (width, width + 2 * keys, self.num_heads)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=bias)
        self.conv1d = CausalConv1d(width + 2 * keys, conv_kernel, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupRMSNorm(width, width // num_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=bias)

    @classmethod
    def check(
        cls, config: Any, *, num_heads: int | None, head_dim: int, num_groups: int, conv_kernel: int, **options: Any
    ) -> None:
        if num_heads is None and 2 * config.hidden_size % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide {2 * config.hidden_size} channels; set num_heads.")
        heads = num_heads or 2 * config.hidden_size // head_dim
        if num_groups < 1 or heads % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the {heads} heads.")
        if conv_kernel < 1:
            raise ValueError(f"conv_kernel={conv_kernel} must be at least 1; Mamba-2 has 4.")
        lowest, highest = options["min_time_step"], options["max_time_step"]
        if lowest < 0 or (highest is not None and highest <= lowest):
            raise ValueError(f"Time steps from {lowest} to {highest}: 0 <= min_time_step < max_time_step is needed.")

    def init_weights(self, std: float) -> None:
        init.copy_(self.A_log, torch.arange(1, self.num_heads + 1).log())
        init.ones_(self.D)
        lowest, highest = (math.log(step) for step in TIME_STEPS)
        dt = (torch.rand(self.num_heads) * (highest - lowest) + lowest).exp().clamp(min=1e-4)
        init.copy_(self.dt_bias, dt + (-torch.expm1(-dt)).log())  # the inverse of softplus

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = (hidden_states.shape[0], self.num_heads, self.state_size, self.head_dim)
        return hidden_states.new_zeros(size, dtype=torch.float32), self.conv1d.initial_state(hidden_states)

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        gate, mixed, dt = self.in_proj(hidden_states).split(self.splits, dim=-1)
        mixed, conv_state = self.conv1d(mixed, states[1], rows)
        keys = self.num_groups * self.state_size
        value, key, query = F.silu(mixed).split([self.splits[0], keys, keys], dim=-1)
        value = value.unflatten(-1, (-1, self.head_dim))  # (B, T, H, P)
        key, query = (
            x.unflatten(-1, (-1, self.state_size)).repeat_interleave(self.num_heads // self.num_groups, dim=2)
            for x in (key, query)
        )  # (B, T, H, N)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)  # (B, T, H)
        decay = -self.A_log.float().exp() * dt
        output, state = linear_attention(
            query, key, value * dt[..., None], states[0], rows, decay, owner=type(self).__name__
        )
        output = output + self.D.float()[:, None] * value
        output = self.norm(output.flatten(2), gate).to(hidden_states.dtype)
        return self.out_proj(output), (state, conv_state)
