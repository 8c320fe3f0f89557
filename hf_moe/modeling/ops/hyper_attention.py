"""HyperAttention (https://arxiv.org/abs/2310.05869): causal attention whose far part is estimated.

The triangle of causal scores is cut into 2^l small triangles on the diagonal and, on each level above, squares below
it whose keys all precede their queries. The triangles are exact. In a square of side s, similar queries and keys are
brought together by sorting both by a locality-sensitive hash; blocks of b on the sorted diagonal are exact, the rest
is estimated from m keys drawn uniformly. Parts of one softmax are joined by their log-sum-exp. The cost is
O(n log n (b + m)), and O(n min_seq_len) for the triangles.

Letters: B batch, H heads, n tokens, N nodes of one level, s side of a square, d head width, r projections.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

QUERY_CHUNK = 512  # queries whose exact scores are held at a time
PartialSoftmax = tuple[
    torch.Tensor, torch.Tensor
]  # output (..., n, d) and log-sum-exp (..., n) of the scores, in fp32


class HyperOptions(NamedTuple):
    """How the far part is estimated."""

    block_size: int  # b
    sample_size: int  # m
    num_projections: int  # r
    min_seq_len: int  # triangles up to this side, and squares below it, are exact
    seed: int
    layer_idx: int


def num_levels(length: int, options: HyperOptions) -> int:
    """How often `length` tokens are halved."""
    levels = 0
    while length > options.min_seq_len * 2**levels:
        levels += 1
    return levels


def is_estimated(length: int, options: HyperOptions) -> bool:
    """Whether `length` tokens have a square that is not exact; their largest has half their side, rounded up."""
    levels = num_levels(length, options)
    side = -(-length // 2**levels) * 2**levels // 2
    return levels > 0 and not square_is_exact(side, options)


def square_is_exact(side: int, options: HyperOptions) -> bool:
    """Small squares are exact, and so are those that one block or the samples cover at the same cost."""
    return side < options.min_seq_len or side <= max(options.block_size, options.sample_size)


def hyper_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, options: HyperOptions
) -> torch.Tensor:
    """Causal attention of rows without padding and packing.

    Args:
        query: (B, H, n, d), key and value alike: repeat the heads of grouped keys first.

    Returns:
        (B, H, n, d) in fp32, differentiable; the same for the same inputs, options and kind of device.
    """
    length, levels = query.shape[2], num_levels(query.shape[2], options)
    leaf = -(-length // 2**levels)
    # The last leaf is filled up. What fills it comes after every real token, so no real query ever sees it: where a
    # square has such keys, all its queries are fillings too.
    filling = leaf * 2**levels - length
    query, key, value = (F.pad(x, (0, 0, 0, filling)) for x in (query, key, value))
    query_buckets, key_buckets = hash_buckets(query, length, options), hash_buckets(key, length, options)
    triangles = (x.unflatten(2, (-1, leaf)) for x in (query, key, value))
    output, lse = (x.flatten(2, 3) for x in exact_attention(*triangles, scaling=scaling, causal=True))
    for level in range(levels):
        queries, query_hashes = half(query, level, 1), half(query_buckets, level, 1)
        keys, values, key_hashes = (half(x, level, 0) for x in (key, value, key_buckets))
        far = square_attention(queries, keys, values, query_hashes, key_hashes, scaling, options, level)
        joined = join_softmax((half(output, level, 1), half(lse, level, 1)), far)
        output, lse = (torch.stack([half(x, level, 0), y], 3).flatten(2, 4) for x, y in zip((output, lse), joined))
    return output[:, :, :length]


def half(values: torch.Tensor, level: int, which: int) -> torch.Tensor:
    """First (0) or second (1) halves of the 2^level nodes: (B, H, n, ...) -> (B, H, N, s, ...)."""
    return values.unflatten(2, (2**level, 2, -1))[:, :, :, which]


def square_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_buckets: torch.Tensor,
    key_buckets: torch.Tensor,
    scaling: float,
    options: HyperOptions,
    level: int,
) -> PartialSoftmax:
    """Attention of s queries to s keys (B, H, N, s, d) without a mask, estimated; buckets are (B, H, N, s)."""
    side, block = query.shape[-2], options.block_size
    if square_is_exact(side, options):
        return exact_attention(query, key, value, scaling, causal=False)
    query_order, key_order = (x.sort(dim=-1, stable=True).indices for x in (query_buckets, key_buckets))
    query, key, value = take_rows(query, query_order), take_rows(key, key_order), take_rows(value, key_order)
    blocks = -(-side // block)
    padded = (F.pad(x, (0, 0, 0, blocks * block - side)).unflatten(-2, (blocks, block)) for x in (query, key, value))
    real = torch.arange(blocks * block, device=query.device).view(blocks, 1, block) < side
    near, near_lse = (x.flatten(3, 4)[:, :, :, :side] for x in softmax_attention(*padded, scaling=scaling, mask=real))
    # every query weighs the same draws, a draw counts for s / m keys, those of the query's own block are done already
    draws = draw_indices(query.shape[1], query.shape[2], side, level, options, query.device)
    draws = draws.expand(*query.shape[:3], -1)
    rows = torch.arange(side, device=query.device) // block
    elsewhere = rows[:, None] != (draws // block)[..., None, :]
    far, far_lse = softmax_attention(query, take_rows(key, draws), take_rows(value, draws), scaling, elsewhere)
    output, lse = join_softmax((near, near_lse), (far, far_lse + math.log(side / options.sample_size)))
    back = query_order.argsort(-1)
    return take_rows(output, back), lse.gather(-1, back)


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> PartialSoftmax:
    """Attention of n queries to n keys (..., n, d), a chunk of queries at a time; scores are recomputed backward."""
    length, pieces = query.shape[-2], []
    for start in range(0, length, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, length)
        seen, mask = stop if causal else length, None
        if causal:
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).tril(start)
        inputs = query[..., start:stop, :], key[..., :seen, :], value[..., :seen, :], scaling, mask
        pieces.append(checkpoint(softmax_attention, *inputs, use_reentrant=False, preserve_rng_state=False))
    outputs, lses = zip(*pieces)
    return torch.cat(outputs, -2), torch.cat(lses, -1)


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> PartialSoftmax:
    """Attention (..., n, d) to (..., s, d) where the mask (..., n, s) is True, with its log-sum-exp."""
    scores = query @ key.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if mask is not None:  # finite: a query whose draws all fall into its own block gets weight zero, not NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights.to(value.dtype) @ value).to(scores.dtype), lse


def join_softmax(one: PartialSoftmax, other: PartialSoftmax) -> PartialSoftmax:
    """The softmax over both sets of keys."""
    lse = torch.logaddexp(one[1], other[1])
    share, other_share = ((part - lse).exp()[..., None] for part in (one[1], other[1]))
    return one[0] * share + other[0] * other_share, lse


def take_rows(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`values` (..., s, d) at positions `order` (..., m)."""
    return values.gather(-2, order[..., None].expand(*order.shape, values.shape[-1]))


@torch.no_grad()
def hash_buckets(vectors: torch.Tensor, length: int, options: HyperOptions) -> torch.Tensor:
    """Buckets of (B, H, n, d), (B, H, n): neighbouring buckets are regions on two sides of one hyperplane.

    The signs of r random projections form a number, its place in the Gray code is the bucket. (The released code takes
    the Gray code of the number instead, so that some neighbours differ in several signs.) Fillings come last.
    """
    projections = draw_normals(vectors.shape[-1], options, vectors.device)
    signs = vectors.float() @ projections > 0
    number = (signs * 2 ** torch.arange(options.num_projections, device=vectors.device)).sum(-1)
    bucket = number
    for shift in range(1, options.num_projections):
        bucket = bucket ^ (number >> shift)
    return bucket.where(torch.arange(vectors.shape[2], device=vectors.device) < length, 2**options.num_projections)


def draw_indices(heads: int, nodes: int, side: int, level: int, options: HyperOptions, device: Any) -> torch.Tensor:
    """(H, N, m) positions below `side`, with replacement, each head and node its own."""
    shape = (heads, nodes, options.sample_size)
    bits = random_bits(math.prod(shape), (options.seed, options.layer_idx, 1 + level), device)
    return (bits * side >> 32).view(shape)


def draw_normals(size: int, options: HyperOptions, device: Any) -> torch.Tensor:
    """(d, r) standard normal numbers, the same for all levels and heads."""
    bits = random_bits(size * options.num_projections, (options.seed, options.layer_idx, 0), device)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # 23 bits: exact in fp32, never 0 or 1
    return torch.special.ndtri(uniform).view(size, options.num_projections)


def random_bits(number: int, key: tuple[int, ...], device: Any) -> torch.Tensor:
    """(number,) integers below 2^32 that depend on `key` alone.

    Hashed counters instead of a generator: the same on every device, inside a compiled graph, and when gradient
    checkpointing runs a layer twice.
    """
    bits = torch.arange(number, device=device)
    for part in key:
        bits = bits ^ (part * 0x9E3779B1 & 0xFFFFFFFF)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a permutation of 32 bits by C. Wellons
            bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
        bits = bits ^ (bits >> 16)
    return bits
