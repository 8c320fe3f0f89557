"""What Gated DeltaNet and Kimi Delta Attention have in common; a subclass says how a state forgets.

    q, k = l2(silu(conv(W_q x))), l2(silu(conv(W_k x))),   v = silu(conv(W_v x)),   beta = sigmoid(W_b x)
    o = delta_rule(q / sqrt(K), k, v, log alpha, beta),    y = W_o (RMSNorm(o) * gate(x))

Letters: B batch, T time, D width, H value heads, K key width, V value width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..layers import RMSNorm
from ..ops.convolution import CausalConv1d
from ..ops.delta_rule import at_least_fp32, delta_rule
from ..ops.gated_norm import GatedRMSNorm
from ..packing import Rows
from .recurrent_mixer import RecurrentMixer


class DeltaMixer(RecurrentMixer):
    """Projections, short convolutions, delta rule and output gate. Its state is H K V numbers in fp32."""

    tp_plan = dict.fromkeys((*(f"{name}_proj" for name in "qkvbo"), "o_norm"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_heads: int | None,
        num_value_heads: int | None,
        key_head_dim: int | None,
        value_head_dim: int | None,
        conv_kernel_size: int,
        allow_neg_eigval: bool,
        gated: bool,
        swish: bool,
    ) -> None:
        super().__init__()
        self.layer_idx, self.allow_neg_eigval, self.gated = layer_idx, allow_neg_eigval, gated
        self.num_heads = num_heads or config.num_attention_heads
        self.num_value_heads = num_value_heads or self.num_heads
        self.key_head_dim = key_head_dim or config.head_dim
        self.value_head_dim = value_head_dim or self.key_head_dim
        size, key_size = config.hidden_size, self.num_heads * self.key_head_dim
        self.value_size = self.num_value_heads * self.value_head_dim
        self.q_proj = nn.Linear(size, key_size, bias=False)
        self.k_proj = nn.Linear(size, key_size, bias=False)
        self.v_proj = nn.Linear(size, self.value_size, bias=False)
        self.b_proj = nn.Linear(size, self.num_value_heads, bias=False)
        self.q_conv1d = CausalConv1d(key_size, conv_kernel_size)
        self.k_conv1d = CausalConv1d(key_size, conv_kernel_size)
        self.v_conv1d = CausalConv1d(self.value_size, conv_kernel_size)
        norm = (self.value_head_dim, config.rms_norm_eps)
        self.o_norm = GatedRMSNorm(*norm, swish) if gated else RMSNorm(*norm)
        self.o_proj = nn.Linear(self.value_size, size, bias=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Mark the parameters of the decay for optimizers that look; here because loading replaces parameters."""
        super().register_parameter(name, param)
        if param is not None and name in ("A_log", "dt_bias"):  # weight decay would pull all rates together
            param._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def check(
        cls, config: Any, *, num_heads: int | None, num_value_heads: int | None, conv_kernel_size: int, **options: Any
    ) -> None:
        sizes = {name: options[name] for name in ("key_head_dim", "value_head_dim")}
        for name, count in {**sizes, "num_heads": num_heads, "num_value_heads": num_value_heads}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1, or null for the default.")
        key_heads: int = num_heads or config.num_attention_heads
        if num_value_heads is not None and num_value_heads % key_heads:
            raise ValueError(
                f"num_value_heads={num_value_heads} must be a multiple of num_heads={key_heads}: every key head "
                "serves the same number of value heads."
            )
        if conv_kernel_size < 2:
            raise ValueError(f"conv_kernel_size={conv_kernel_size} must be at least 2; the published models have 4.")

    def log_decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> log decay (B, T, H) or (B, T, H, K), at least fp32, at most 0."""
        raise NotImplementedError

    def output_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> what the activation of the output's gate is given (B, T, H V)."""
        raise NotImplementedError

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        size = (hidden_states.shape[0], self.num_value_heads, self.key_head_dim, self.value_head_dim)
        convolutions = [conv.initial_state(hidden_states) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        return *convolutions, hidden_states.new_zeros(size, dtype=dtype)

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        query, query_state = self.q_conv1d(self.q_proj(hidden_states), states[0], rows)
        key, key_state = self.k_conv1d(self.k_proj(hidden_states), states[1], rows)
        value, value_state = self.v_conv1d(self.v_proj(hidden_states), states[2], rows)
        query, key = (F.silu(x.contiguous()).unflatten(-1, (self.num_heads, -1)) for x in (query, key))
        value = F.silu(value.contiguous()).unflatten(-1, (self.num_value_heads, -1))
        beta = at_least_fp32(self.b_proj(hidden_states)).sigmoid() * (2 if self.allow_neg_eigval else 1)
        decay, owner = self.log_decay(hidden_states), type(self).__name__
        output, state = delta_rule(query, key, value, decay, beta, states[3], rows, owner)
        if self.gated:
            output = self.o_norm(output, self.output_gate(hidden_states).view_as(output))
        else:
            output = self.o_norm(output)
        return self.o_proj(output.flatten(2).to(hidden_states.dtype)), (query_state, key_state, value_state, state)


def init_decay(rate_log: torch.Tensor, bias: torch.Tensor, slowest: float, fastest: float) -> None:
    """Mamba's initialisation of a decay `exp(rate_log) softplus(x + bias)`, which fla's layers share.

    Rates are uniform between `slowest` and `fastest`, softplus(bias) is log-uniform between 0.001 and 0.1.
    """
    init.copy_(rate_log, torch.empty_like(rate_log).uniform_(slowest, fastest).log())
    step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    init.copy_(bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
