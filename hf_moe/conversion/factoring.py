"""Factors of several matrices that share a basis, W_i = A_i B (https://arxiv.org/abs/2503.23100).

Letters: n matrices W_i (F, D), basis B (L, D), coordinates A_i (F, L).

Where L is large enough the factors are exact: B = I needs L >= D, B = the distinct matrices themselves needs L >= F
for each of them. Below that, the thin SVD of the stack [W_1; ...; W_n] = U S V^T, cut to L, is the best in Frobenius
norm (Eckart and Young): B = S^(1/2) V^T, A_i = U_i S^(1/2). Rows of B that nothing needs are random and their
coordinates zero: if both were zero, neither would ever learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .recipes import Concat, Kitchen, Normal, Recipe

CHUNK_ROWS = 4096
SMALLEST = 1e-7  # of the largest singular value; directions below it hold nothing but rounding


@dataclass(frozen=True)
class Transpose(Recipe):
    """The transposed matrix."""

    of: Recipe

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return self.of.run(kitchen).T.contiguous()


@dataclass(frozen=True)
class Identity(Recipe):
    """(rows, columns) ones where column - row = start, else zeros."""

    rows: int
    columns: int
    start: int = 0

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        result = torch.zeros(self.rows, self.columns, dtype=kitchen.dtype, device=kitchen.device)
        if not kitchen.planning:
            result.diagonal(self.start).fill_(1)
        return result


@dataclass(frozen=True)
class Widened(Recipe):
    """A matrix with columns of zeros behind it, `columns` in all."""

    of: Recipe
    columns: int

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        matrix = self.of.run(kitchen)
        return torch.nn.functional.pad(matrix, (0, self.columns - matrix.shape[1]))


@dataclass(frozen=True)
class TruncatedBasis(Recipe):
    """(L, D) B = S^(1/2) V^T of the stack of some matrices; `key` names them."""

    of: tuple[Recipe, ...]
    size: int
    key: str

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        first = self.of[0].run(kitchen)
        if kitchen.planning:
            return first.new_empty(self.size, first.shape[1])
        values, vectors = principal_directions(kitchen, self.of, self.size, self.key)
        return (values.sqrt() * vectors).T.to(first.dtype).contiguous()


@dataclass(frozen=True)
class TruncatedCoordinates(Recipe):
    """(F, L) A_i = W_i V S^(-1/2) of one of the matrices that share a basis; the same as U_i S^(1/2)."""

    of: tuple[Recipe, ...]
    size: int
    key: str
    number: int

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        matrix = self.of[self.number].run(kitchen)
        result = matrix.new_empty(matrix.shape[0], self.size)
        if kitchen.planning:
            return result
        values, vectors = principal_directions(kitchen, self.of, self.size, self.key)
        for rows, kept in zip(matrix.split(CHUNK_ROWS), result.split(CHUNK_ROWS), strict=True):
            kept.copy_(rows.double() @ vectors / values.sqrt())
        return result


def principal_directions(
    kitchen: Kitchen, matrices: tuple[Recipe, ...], size: int, key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) largest singular values of a stack of matrices and their (D, L) right singular vectors, in float64.

    They come from V S^2 V^T = sum_i W_i^T W_i, so that one matrix is in memory at a time.
    """
    return kitchen.once(("directions", key), partial(_principal_directions, kitchen, matrices, size), keep=4)


def _principal_directions(
    kitchen: Kitchen, matrices: tuple[Recipe, ...], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    gram: torch.Tensor | None = None
    for matrix in matrices:
        for rows in matrix.run(kitchen).split(CHUNK_ROWS):
            wide = rows.double()
            gram = wide.T @ wide if gram is None else gram.addmm_(wide.T, wide)
    assert gram is not None
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    values = squares[-size:].flip(0).clamp(min=0).sqrt()
    floor = max(values[0].item() * SMALLEST, torch.finfo(torch.float64).tiny)
    return values.clamp(min=floor), vectors[:, -size:].flip(1)


def factor(
    matrices: Sequence[Recipe], shape: tuple[int, int], size: int, std: float, key: str
) -> tuple[Recipe, list[Recipe]]:
    """Recipes of B and of all A_i.

    Args:
        matrices: n matrices; equal ones are recognised.
        shape: (F, D) of each.
        size: L.
        std: of the rows of B that nothing needs.
        key: names B.
    """
    rows, width = shape
    distinct: list[Recipe] = []
    for matrix in matrices:
        if matrix not in distinct:
            distinct.append(matrix)
    if size >= width:
        return _filled((Identity(width, width),), width, shape, size, std, key), [Widened(m, size) for m in matrices]
    if size >= rows * len(distinct):
        basis = _filled(tuple(distinct), rows * len(distinct), shape, size, std, key)
        return basis, [Identity(rows, size, distinct.index(matrix) * rows) for matrix in matrices]
    together = tuple(distinct)
    return TruncatedBasis(together, size, key), [
        TruncatedCoordinates(together, size, key, distinct.index(matrix)) for matrix in matrices
    ]


def _filled(parts: tuple[Recipe, ...], used: int, shape: tuple[int, int], size: int, std: float, key: str) -> Recipe:
    """The needed rows of B, then random ones."""
    spare = (Normal((size - used, shape[1]), std, key),) if size > used else ()
    return Concat(parts + spare) if len(parts) + len(spare) > 1 else parts[0]
