"""The rows of UltraMem's memory: looked up, scaled and added up, never held for all tokens.

Letters: N tokens, R rows, V value size, P pre-value size, K rows per token, C cores, G groups of virtual rows.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..parts import Part
from .row_lookup import row_products, weighted_rows


class MemoryTable(Part):
    """`forward(rows (N, K), scores (N, K, C), groups (N, K) | None, num_groups, pre (N, P) | None) -> (N, G V)`.

    A value is cut into C pieces, and piece c is scaled by the score of core c; each group's values are added up, and
    the sums put side by side. With pre-values every score is also multiplied by `act(pre . pre_value)`: the row is
    then a neuron with an input side, as in PEER.

    Args:
        num_rows: rows R.
        value_size: V.
        pre_value_size: P; 0 for none.
        pre_activation: a key of Transformers' `ACT2FN`, or None.
    """

    def __init__(self, num_rows: int, value_size: int, pre_value_size: int, pre_activation: str | None) -> None:
        super().__init__()
        self.act_fn = nn.Identity() if pre_activation is None else ACT2FN[pre_activation]
        self.values = nn.Parameter(torch.empty(num_rows, value_size))
        self.pre_values = nn.Parameter(torch.empty(num_rows, pre_value_size)) if pre_value_size else None

    def extra_repr(self) -> str:
        return f"{tuple(self.values.shape)}, {None if self.pre_values is None else tuple(self.pre_values.shape)}"

    def init_weights(self, std: float) -> None:
        for table in self.parameters(recurse=False):
            init.normal_(table, std=std)

    def forward(
        self,
        rows: torch.Tensor,
        scores: torch.Tensor,
        groups: torch.Tensor | None = None,
        num_groups: int = 1,
        pre: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.pre_values is not None:
            assert pre is not None, "the layers that share a table agree about pre-values"
            factors = self.act_fn(row_products(self.pre_values, rows, pre))
            scores = scores * factors[:, :, None].to(scores.dtype)
        num_cores = scores.shape[-1]
        pieces = self.values.view(-1, self.values.shape[-1] // num_cores)  # row i's piece c is row i C + c
        rows = rows[:, None] * num_cores + torch.arange(num_cores, device=rows.device)[:, None]  # (N, C, K)
        weights = scores.transpose(1, 2)  # (N, C, K)
        if groups is None:
            return weighted_rows(pieces, rows.flatten(0, 1), weights.flatten(0, 1)).view(rows.shape[0], -1)
        order = groups.argsort(dim=1)[:, None].expand_as(rows)
        sums = weighted_rows(
            pieces,
            rows.gather(2, order).flatten(),
            weights.gather(2, order).flatten(),
            starts_of(groups, num_groups, num_cores),
        )
        return sums.view(-1, num_cores, num_groups, pieces.shape[-1]).transpose(1, 2).flatten(1)


def starts_of(groups: torch.Tensor, num_groups: int, num_cores: int) -> torch.Tensor:
    """(N C G,) where the rows of each token, core and group begin, sorted so; groups (N, K)."""
    counts = (groups[:, :, None] == torch.arange(num_groups, device=groups.device)).sum(1)  # (N, G)
    counts = counts[:, None].expand(-1, num_cores, -1).flatten()
    return counts.cumsum(0) - counts


def side_of(num_rows: int, share_ratio: float | None) -> int:
    """Keys per half with which a layer addresses its share of the rows; None is all of them."""
    return math.isqrt(num_rows if share_ratio is None else int(num_rows * share_ratio))


def permutation_of(size: int, seed: int) -> torch.Tensor:
    """(size,) a random order of 0 ... size - 1 on the CPU, the same whenever and wherever it is asked for."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def check_table(
    num_rows: int,
    *,
    value_size: int,
    pre_value_size: int,
    pre_activation: str | None,
    share_ratio: float | None,
    num_cores: int,
    **options: Any,
) -> None:
    """Raise `ValueError` for a table that cannot be cut up in this way."""
    if num_rows < 1 or value_size < 1 or pre_value_size < 0:
        raise ValueError("num_keys and value_size must be at least 1, pre_value_size at least 0.")
    if num_cores < 1 or value_size % num_cores:
        raise ValueError(
            f"num_cores={num_cores} must divide value_size={value_size}: use one of "
            f"{[n for n in range(1, value_size + 1) if value_size % n == 0]}."
        )
    if share_ratio is not None and not (0 < share_ratio <= 1 and side_of(num_rows, share_ratio)):
        raise ValueError(f"share_ratio={share_ratio} must leave 1 to {num_rows} rows: at most 1, and above 0.")
    if pre_activation is not None and pre_activation not in ACT2FN:
        raise ValueError(f"Unknown pre_activation {pre_activation!r}; choose from {sorted(ACT2FN)}.")
    if pre_activation is not None and not pre_value_size:
        raise ValueError("pre_activation has no effect without pre-values; set pre_value_size.")
