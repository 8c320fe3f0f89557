"""Ternary weights (BitNet b1.58, https://arxiv.org/abs/2402.17764, §2): {-1, 0, 1} times one scale per matrix.

    scale = mean |W|,   codes = round(clip(W / scale, -1, 1))

The straight-through estimator passes gradients through the rounding as if it were not there. Four codes fit in a byte.
Letters: O outputs, I inputs of a matrix.
"""

import torch
import torch.nn.functional as F

SMALLEST = 1e-5  # BitNet's floor of every scale: a matrix or a token of zeros divides by it


def ternary_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmean quantisation of matrices (..., O, I).

    Returns:
        codes (..., O, I) of -1, 0 and 1, and scale (..., 1, 1), both in fp32 (fp64 for fp64 weights).
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = weight.abs().mean((-2, -1), keepdim=True).clamp(min=SMALLEST)
    return (weight / scale).clamp(-1, 1).round(), scale


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, to the last bit, with the gradient of `value`."""
    return rounded.detach().to(value.dtype) + (value - value.detach())


def absmax_rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values (..., I) rounded to `bits` bits per vector, its largest magnitude being the largest integer."""
    limit = 2 ** (bits - 1) - 1
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    step = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / limit
    return straight_through(values, (wide / step).round() * step)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., I) of -1, 0 and 1 as bytes (..., ceil(I / 4)): two bits each, the first in the lowest."""
    shifted = F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[-1] % 4))
    fields = shifted.unflatten(-1, (-1, 4))
    return fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6


def unpack_codes(packed: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """What `pack_codes` was given: codes (..., size), exactly."""
    fields = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return fields.flatten(-2)[..., :size].to(dtype) - 1
