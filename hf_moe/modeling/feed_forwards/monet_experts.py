"""Monet's experts: n^2 of them, put together from 2 n halves (https://arxiv.org/abs/2412.04139, §3, appendix A.1).

The sums over heads and experts are reordered, so that nothing of size n^2 exists. Letters: N tokens, D width, H heads,
n keys of a side, m width of one expert. Names of weights are those of the public code (dmis-lab/Monet).
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..parts import Part


class HorizontalExperts(Part):
    """n first layers and n second layers: `forward(tokens (N, D), first (N, H, n), second (N, H, n)) -> (N, D)`."""

    def __init__(self, hidden_size: int, num_keys: int, expert_size: int, activation: str) -> None:
        super().__init__()
        self.num_keys, self.act_fn = num_keys, ACT2FN[activation]
        self.u = nn.Linear(hidden_size, num_keys * expert_size)
        self.v = nn.Linear(num_keys * expert_size, hidden_size, bias=False)
        self.b = nn.Parameter(torch.empty(num_keys, hidden_size))

    def init_weights(self, std: float) -> None:
        init.zeros_(self.b)

    def forward(self, tokens: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.u(tokens)).unflatten(-1, (self.num_keys, -1))  # (N, n, m)
        first, second = first.to(hidden.dtype), second.to(hidden.dtype)
        crossed = second.mT @ (first @ hidden)  # (N, n, m) over the heads: sum_h g2_hj sum_i g1_hi act(U_i x)
        return self.v(crossed.flatten(-2)) + second.sum(1) @ self.b


class VerticalExperts(Part):
    """n left and n right halves: `forward(tokens (N, D), first (N, H, n), second (N, H, n)) -> (N, D)`."""

    def __init__(self, hidden_size: int, num_keys: int, expert_size: int, activation: str) -> None:
        super().__init__()
        self.num_keys, self.act_fn = num_keys, ACT2FN[activation]
        inner, half = num_keys * expert_size // 2, hidden_size // 2
        self.u1, self.u2 = nn.Linear(hidden_size, inner), nn.Linear(hidden_size, inner)
        self.v11, self.v12 = nn.Linear(inner, half, bias=False), nn.Linear(inner, half, bias=False)
        self.v21, self.v22 = nn.Linear(inner, half, bias=False), nn.Linear(inner, half, bias=False)
        self.b1, self.b2 = nn.Parameter(torch.empty(num_keys, half)), nn.Parameter(torch.empty(num_keys, half))

    def init_weights(self, std: float) -> None:
        init.zeros_(self.b1)
        init.zeros_(self.b2)

    def forward(self, tokens: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        left = self.act_fn(self.u1(tokens)).unflatten(-1, (self.num_keys, -1))  # (N, n, m / 2)
        right = self.act_fn(self.u2(tokens)).unflatten(-1, (self.num_keys, -1))
        first, second = first.to(left.dtype), second.to(left.dtype)
        of_first, of_second = first.sum(1), second.sum(1)  # (N, n): the other side's weights sum to 1 in every head
        top = self.v11((left * of_first[..., None]).flatten(-2)) + of_first @ self.b1
        top = top + self.v12((first.mT @ (second @ right)).flatten(-2))
        bottom = self.v22((right * of_second[..., None]).flatten(-2)) + of_second @ self.b2
        bottom = bottom + self.v21((second.mT @ (first @ left)).flatten(-2))
        return torch.cat([top, bottom], dim=-1)
