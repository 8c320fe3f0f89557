"""BASED's gated short convolution, "BaseConv" (https://arxiv.org/abs/2402.18668, section 4.2; code: BaseConv).

    y = W_out (silu(conv(u1)) o u2) + b_out,    [u1, u2] = W_in x + b_in

Letters: B batch, T time, C channels, W kernel width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.convolution import CausalConv1d
from ..packing import Rows
from .recurrent_mixer import RecurrentMixer


class ShortConvolution(RecurrentMixer):
    """Each channel looks at the last W tokens, gated by the token itself; the state is the last W - 1 inputs.

    Args:
        expand: width of W_in's output in hidden sizes: C = expand / 2 hidden sizes.
        kernel_size: W.
        bias: biases on the two projections.
        conv_bias: a bias on the convolution: off in the authors' plain path, on in that of their CUDA kernel.
    """

    tp_plan = {"in_proj": "replicate", "out_proj": "replicate"}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        expand: int = 4,
        kernel_size: int = 3,
        bias: bool = True,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.layer_idx, channels = layer_idx, expand * config.hidden_size // 2
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=bias)
        self.conv = CausalConv1d(channels, kernel_size, bias=conv_bias)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=bias)

    @classmethod
    def check(cls, config: Any, *, expand: int, kernel_size: int, **options: Any) -> None:
        if expand < 1 or expand * config.hidden_size % 2:
            raise ValueError(f"expand={expand} times hidden_size={config.hidden_size} must be a positive even number.")
        if kernel_size < 2:
            raise ValueError(f"kernel_size={kernel_size}: with less than 2 no token sees another one.")

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.conv.initial_state(hidden_states),)

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        mixed, gate = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, T, C) each
        mixed, state = self.conv(mixed, states[0], rows)
        return self.out_proj(F.silu(mixed) * gate), (state,)
