"""Positions of a few ones among many zeros, in nearly as few bits as they have information.

Golomb-Rice coding (Golomb 1966, Rice 1979): the gap g before each one is written as `g >> m` ones and a zero, and the
lowest m bits of g; m is the one that makes the whole shortest. Unary parts and low bits are kept apart, so that all
gaps are decoded at once. Letters: n ones, d positions.
"""

import numpy as np

LARGEST_SHIFT = 40


def shortest_shift(gaps: np.ndarray) -> int:
    """The m with which gaps (n,) take the fewest bits: `sum(g >> m) + n (1 + m)`."""
    sizes = [int((gaps >> shift).sum()) + len(gaps) * (1 + shift) for shift in range(LARGEST_SHIFT)]
    return int(np.argmin(sizes))


def encode(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Code ascending positions (n,) of ones.

    Returns:
        Unary parts and low bits, both packed into bytes, and m.
    """
    gaps = np.diff(positions.astype(np.int64), prepend=-1) - 1
    shift = shortest_shift(gaps)
    quotients = gaps >> shift
    ends = np.cumsum(quotients + 1) - 1  # where the zero of each gap is
    unary = np.ones(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    unary[ends] = 0
    low = np.empty((len(gaps), shift), dtype=np.uint8)
    for bit in range(shift):
        low[:, bit] = (gaps >> (shift - 1 - bit)) & 1
    return np.packbits(unary), np.packbits(low), shift


def decode(unary: np.ndarray, low: np.ndarray, shift: int, number: int) -> np.ndarray:
    """Undo `encode`.

    Args:
        number: n.

    Returns:
        (n,) ascending positions.

    Raises:
        ValueError: fewer bits than n ones need.
    """
    ends = np.flatnonzero(np.unpackbits(unary) == 0)[:number]
    bits = np.unpackbits(low)
    if len(ends) < number or len(bits) < number * shift:
        raise ValueError(f"The code ends after {len(ends)} of {number} positions: the file is damaged.")
    gaps = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << shift
    of_gap = bits[: number * shift].reshape(number, shift)
    for bit in range(shift):
        gaps |= of_gap[:, bit].astype(np.int64) << (shift - 1 - bit)
    return np.cumsum(gaps + 1) - 1
