"""Linear attention whose state forgets by one scalar per head: none, a constant, or one per token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

computed in chunks of C tokens: inside a chunk as masked scores, from chunk to chunk through the state (Mamba-2, "SSD",
https://arxiv.org/abs/2405.21060, section 6; Lightning Attention-2, https://arxiv.org/abs/2401.04658).

Letters: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, n chunks.
"""

import itertools
from typing import NamedTuple

import torch

from ..packing import Rows
from .kernels import fla_kernel, run_fla

CHUNK = 64
SPAN = 1024  # tokens computed together: what many more need does not fit into the caches of a processor


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    rows: Rows,
    log_decay: torch.Tensor | None = None,
    owner: str = "linear_attention",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing is scaled or normalized here. Padding changes no state; no state crosses from sequence to sequence.

    Args:
        query, key: (B, T, H, K).
        value: (B, T, H, V).
        state: (B, H, K, V), of the sequence of the first column.
        log_decay: g <= 0 as (B, T, H), or (H,) if it is the same for every token; None is 0.
        owner: the mixer, for the log.

    Returns:
        Output (B, T, H, V) and the state after the last token, both in float32 (float64 for float64 inputs); a kernel
        answers in the dtype of `query`.
    """
    if rows.mask is not None:
        key = key.masked_fill(~rows.mask[..., None, None], 0)
        log_decay = None if log_decay is None else log_decay.where(rows.mask[..., None], 0)
    kernel = fla_kernel(owner, "fla.ops.simple_gla", "chunk_simple_gla", query)
    if kernel is not None and query.shape[1] > 1:
        inputs, options = {"q": query, "k": key.to(query.dtype), "v": value.to(query.dtype)}, {}
        if log_decay is not None and log_decay.ndim == 1:  # as `g` the kernel would compute a gradient for it
            options["g_gamma"] = log_decay.float()
        elif log_decay is not None:
            inputs["g"] = log_decay.float()
        return run_fla(kernel, inputs, state, rows.segments, **options)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value, state = (x.to(dtype) for x in (query, key, value, state))
    log_decay = None if log_decay is None else log_decay.to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # sums over all of time: not in half precision
        if query.shape[1] == 1:
            return one_token(query, key, value, state, log_decay)
        return whole_chunks(query, key, value, state, rows.segments, log_decay)


def one_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor, log_decay: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence itself: a single token is of the sequence of the state."""
    if log_decay is not None:
        state = state * log_decay.view(-1, state.shape[1], 1, 1).exp()
    state = state + key[:, 0, :, :, None] * value[:, 0, :, None]
    return (query[:, 0, :, None] @ state).transpose(1, 2), state


def whole_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    segments: torch.Tensor | None,
    log_decay: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full chunks, those of a span together, then the rest as one shorter chunk: there is nothing to pad."""
    time = query.shape[1]
    full = time - time % CHUNK
    starts = [*range(0, full, SPAN), *[full] * (full < time)]
    lengths = [stop - start for start, stop in itertools.pairwise([*starts, time])]
    # split, not sliced: the gradient of a slice is as long as the whole
    parts = (x.split(lengths, 1) for x in (query, key, value))
    decays = [log_decay] * len(lengths) if log_decay is None or log_decay.ndim == 1 else log_decay.split(lengths, 1)
    outputs = []
    for start, length, q, k, v, decay in zip(starts, lengths, *parts, decays):
        span, size = slice(start, start + length), min(CHUNK, length)
        sequences = None if segments is None else (segments[:, span], segments[:, max(start - 1, 0), None])
        output, state = chunks(q, k, v, state, chunk_factors(decay, sequences, size, query), size)
        outputs.append(output)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


class Factors(NamedTuple):
    """What remains, in each chunk, of one thing when another is reached; None is all of it.

    Dimensions are (B, H, n, ...), or 1 where all are the same.
    """

    pairs: torch.Tensor  # (..., C, C) of token j at token i
    entering: torch.Tensor | None  # (..., C, 1) of the state before the chunk at token i
    leaving: torch.Tensor | None  # (..., C, 1) of token j after the chunk
    across: torch.Tensor | None  # (..., 1, 1) of the state before the chunk after it


def chunk_factors(
    log_decay: torch.Tensor | None,
    sequences: tuple[torch.Tensor, torch.Tensor] | None,
    size: int,
    like: torch.Tensor,
) -> Factors:
    """
    Args:
        log_decay: (B, T, H), (H,) or None.
        sequences: segments (B, T), and those of the column before (B, 1).
        size: C, which divides T.
    """
    visible = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if log_decay is None and sequences is None:
        return Factors(visible.to(like.dtype), None, None, None)
    if log_decay is None:
        total = like.new_zeros(1, 1, 1, size)
    elif log_decay.ndim == 1:
        total = log_decay[None, :, None, None].expand(1, -1, 1, size).cumsum(-1)
    else:
        total = log_decay.unflatten(1, (-1, size)).permute(0, 3, 1, 2).cumsum(-1)
    # differences, masked before the exponential: no sum of decays ever becomes a large positive exponent
    pairs, entering, leaving, across = total[..., None] - total[..., None, :], total, total[..., -1:] - total, total
    across = across[..., -1:]
    if sequences is not None:
        ids = sequences[0].unflatten(1, (-1, size))[:, None]
        last = ids[..., -1:]
        before = torch.cat([sequences[1][:, None, None], last[:, :, :-1]], 2)
        visible = visible & (ids[..., None] == ids[..., None, :])
        entering = entering.where(ids == before, -torch.inf)
        leaving = leaving.where(ids == last, -torch.inf)
        across = across.where(last == before, -torch.inf)
    pairs = pairs.where(visible, -torch.inf)
    return Factors(pairs.exp(), entering.exp()[..., None], leaving.exp()[..., None], across.exp()[..., None])


def chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor, factors: Factors, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of `size` tokens, all at once but for the sum of the states over the chunks."""
    # one copy in this order instead of one per product
    query, key, value = (x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous() for x in (query, key, value))
    added = key.transpose(-1, -2) @ (value if factors.leaving is None else value * factors.leaving)  # (B, H, n, K, V)
    before = []
    number = added.shape[2]
    kept = [None] * number if factors.across is None else factors.across.expand(-1, -1, number, -1, -1).unbind(2)
    for new, remains in zip(added.unbind(2), kept):
        before.append(state)
        state = new + (state if remains is None else state * remains)
    output = query @ torch.stack(before, 2)
    if factors.entering is not None:
        output = output * factors.entering
    output = output + (query @ key.transpose(-1, -2) * factors.pairs) @ value
    return output.permute(0, 2, 3, 1, 4).flatten(1, 2), state
