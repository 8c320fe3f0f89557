"""Linear maps that differ from row to row: the grouped matrix products that experts of any algebra are made of.

Transformers' ExpertsInterface runs whole SwiGLU experts; this runs one matrix of an expert, by the same three methods.
Letters: N tokens, K chosen experts, S = N K rows, E experts, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from transformers.integrations.moe import _grouped_linear

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class GroupedRows:
    """The (token, slot) pairs of one routing, sorted by expert; or the pairs that a caller lists.

    Attributes:
        token: (S,) token of each row.
        expert: (S,) expert of each row, ascending.
    """

    def __init__(
        self, indices: torch.Tensor, num_experts: int, implementation: str, token: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            indices: (N, K) chosen experts; (S, 1) if `token` lists the rows.
            num_experts: E.
            implementation: how `linear` works: `eager`, `batched_mm` or `grouped_mm`.
            token: (S,) which token each row is of, where tokens have different numbers of rows.
        """
        if implementation not in IMPLEMENTATIONS:
            choices = list(IMPLEMENTATIONS)
            raise ValueError(
                f"experts_implementation={implementation!r} cannot run these experts; use one of {choices}."
            )
        self.implementation, self.shape = implementation, indices.shape
        self.expert, self.permutation = torch.sort(indices.flatten())
        self.listed = token is not None
        self.token = self.permutation // indices.shape[1] if token is None else token[self.permutation]
        # histc, as in Transformers: bincount would break CUDA graphs; deterministic only in float on CPU, int on CUDA
        counted = self.expert.float() if indices.device.type in ("cpu", "mps") else self.expert.int()
        counts = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
        self.offsets = counts.cumsum(0, dtype=torch.int32)

    def order(self, values: torch.Tensor) -> torch.Tensor:
        """(N, K) values -> (S,), in the order of the rows."""
        return values.flatten()[self.permutation]

    def linear(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`rows[s] @ weight[expert[s]].T`: rows (S, I), weight (E, O, I) -> (S, O)."""
        if self.implementation == "grouped_mm":
            return _grouped_linear(rows, weight, self.offsets)
        if self.implementation == "batched_mm":
            return torch.bmm(weight[self.expert], rows[:, :, None].to(weight.dtype)).squeeze(-1)
        ends = self.offsets.tolist()
        pieces = [F.linear(rows[start:end], w) for start, end, w in zip([0, *ends], ends, weight)]
        return torch.cat(pieces)

    def sum(self, rows: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """Add up the rows of each token: (S, O) -> (N, O); listed rows need the number of tokens."""
        if self.listed:
            assert num_tokens is not None
            return rows.new_zeros(num_tokens, rows.shape[-1]).index_add(0, self.token, rows)
        unsorted = torch.empty_like(rows).index_copy(0, self.permutation, rows)
        return unsorted.view(*self.shape, -1).sum(1)
