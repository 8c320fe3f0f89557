"""Sums and dot products with a few rows of a huge table, without ever holding the rows of all tokens.

Letters: N tokens, R rows of the table, W their width, K rows per token.
"""

from typing import Any

import torch
import torch.nn.functional as F

MOST_ELEMENTS = 2**24  # of gathered rows that are in memory at a time


def weighted_rows(
    table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """`y_n = sum_k weights_nk table[indices_nk]`: (R, W), (N, K), (N, K) -> (N, W).

    With `starts` (M,), `indices` and `weights` are flat, and sum m is that of the entries from `starts[m]` on to where
    the next one starts: (M, W).
    """
    return F.embedding_bag(indices, table, starts, per_sample_weights=weights.to(table.dtype), mode="sum")


def row_products(table: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`s_nk = table[indices_nk] . tokens_n`: (R, W), (N, K), (N, W) -> (N, K)."""
    with torch.autocast(tokens.device.type, enabled=False):
        return RowProducts.apply(table, indices, tokens.to(table.dtype))


class RowProducts(torch.autograd.Function):
    """`row_products`, which gathers its rows piece by piece and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(table, indices, tokens)
        size = tokens_at_a_time(indices, table)
        pieces = [(table[i] @ x[:, :, None]).squeeze(-1) for i, x in zip(indices.split(size), tokens.split(size))]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, indices, tokens = ctx.saved_tensors
        table_gradient = token_gradient = None
        if ctx.needs_input_grad[0]:
            table_gradient = torch.zeros_like(table)
            size = tokens_at_a_time(indices, table)
            for i, x, g in zip(indices.split(size), tokens.split(size), gradient.split(size)):
                table_gradient.index_add_(0, i.flatten(), (g[:, :, None] * x[:, None]).flatten(0, 1))
        if ctx.needs_input_grad[2]:
            token_gradient = weighted_rows(table, indices, gradient)
        return table_gradient, None, token_gradient


def tokens_at_a_time(indices: torch.Tensor, table: torch.Tensor) -> int:
    """How many tokens' rows are gathered together."""
    return max(1, MOST_ELEMENTS // (indices.shape[1] * table.shape[1]))
