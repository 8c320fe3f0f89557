"""SPT's product quantiser (https://arxiv.org/abs/2312.10365, released code): vectors as a few small integers.

A vector is cut into M pieces of c entries; the code of a piece is the nearest of its K codewords in L1 distance.
Letters: N vectors, M subspaces, K codewords per subspace, c codeword size, d = M c.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..parts import Part


class ProductQuantizer(Part):
    """The codebook (M, K, c), drawn from N(0, 1).

    Choosing a code has no gradient; the codebook learns from `loss` alone.
    """

    def __init__(self, num_subspaces: int, num_codewords: int, codeword_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_subspaces, num_codewords, codeword_size))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight)

    def extra_repr(self) -> str:
        return "{} subspaces, {} codewords of {}".format(*self.weight.shape)

    def distances(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces (M, N, c) of vectors (N, d), and their L1 distances (M, N, K) to the codewords, in fp32."""
        pieces = vectors.unflatten(-1, (self.weight.shape[0], -1)).transpose(0, 1)
        pieces = pieces.to(torch.promote_types(pieces.dtype, torch.float32))
        return pieces, torch.cdist(pieces.contiguous(), self.weight.to(pieces.dtype), p=1.0)

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes (..., M) of vectors (..., d), integers."""
        _, distances = self.distances(vectors.flatten(0, -2))
        return distances.argmin(-1).t().reshape(*vectors.shape[:-1], -1)

    def loss(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`MSE(soft, hard) + MSE(z, hard)`: scalar, differentiable in the vectors z and in the codebook.

        hard is the nearest codeword, soft the mean of all under weights softmax(-log max(distance, 1e-5)).

        Args:
            vectors: (..., d).
            mask: boolean, broadcastable to (...), which of them count; None for all.
        """
        pieces, distances = self.distances(vectors.flatten(0, -2))
        codebook = self.weight.to(pieces.dtype)
        nearest = distances.argmin(-1)[..., None].expand(-1, -1, pieces.shape[-1])
        hard = codebook.gather(1, nearest)
        soft = (-distances.clamp(min=1e-5).log()).softmax(-1) @ codebook
        errors = ((soft - hard).square() + (pieces - hard).square()).mean((0, 2))  # (N,)
        if mask is None:
            return errors.mean()
        counted = mask.expand(vectors.shape[:-1]).flatten()
        return errors.where(counted, 0).sum() / counted.sum().clamp(min=1)


def one_hot_codes(codes: torch.Tensor, num_codewords: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes (..., M) as (..., M K) zeros and ones: inner products count equal codes, exactly up to M = 256 in bf16."""
    words = torch.arange(num_codewords, device=codes.device, dtype=codes.dtype)
    return (codes[..., None] == words).flatten(-2).to(dtype)


@torch.no_grad()
def best_matches(matches: torch.Tensor, visible: torch.Tensor, share: Fraction, limit: int | None) -> torch.Tensor:
    """The keys that each query attends to; among equal matches the latest.

    Args:
        matches: (B, H, T, S) whole numbers, at most 256.
        visible: (B, 1, T, S) boolean.
        share: of n visible keys ceil(n share) are kept, at least one.
        limit: the most that are ever kept.

    Returns:
        (B, H, T, S) boolean.
    """
    total, top, bottom = matches.shape[-1], share.numerator, share.denominator
    limit = total if limit is None else min(limit, total)
    number = ((visible.sum(-1, keepdim=True) * top + bottom - 1) // bottom).clamp(1, limit)  # (B, 1, T, 1)
    # one integer per key that says both how well it matches and how late it comes
    order = matches.int() * total + torch.arange(total, device=matches.device, dtype=torch.int32)
    order = order.masked_fill(~visible, -1)
    best = order.topk(min(limit, -(-total * top // bottom)), -1).values
    return (order >= best.gather(-1, (number - 1).expand(*best.shape[:-1], 1))) & visible


class GradientOnly(torch.autograd.Function):
    """`output` unchanged; on the way back `loss` receives the gradient 1, as if it were added to the training loss."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.one
