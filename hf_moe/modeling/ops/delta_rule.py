"""The gated delta rule, in chunks (Gated DeltaNet https://arxiv.org/abs/2412.06464, KDA https://arxiv.org/abs/2510.26692).

    S' = diag(exp(g_t)) S_{t-1},   S_t = S' + k_t beta_t (v_t - k_t^T S')^T,   o_t = S_t^T q_t

with keys of length 1 and queries of length 1 / sqrt(K), which is how all published layers use it. Inside a chunk
the rule is a triangular system (2412.06464 §3.3). With G the running sum of g and S the incoming state:

    A(x)_ij = sum_c x_ic k_jc exp(G_ic - G_jc) for j <= i,   L = diag(beta) strict_tril(A(k))
    [U, W] = (I + L)^-1 diag(beta) [V, K exp(G)],   E = U - W S
    O = (Q exp(G)) S + A(q) E,   S_out = diag(exp(G_end)) S + (K exp(G_end - G))^T E

Differences of G are summed up as such: no exponent is ever positive, and a token that forgets everything does not blur
those after it. Packed sequences are cut inside this algebra, by masks.

The forward pass keeps one state per span of chunks; the backward pass computes a span once more and differentiates it,
so nothing but inputs, outputs and gradients is as long as the sequence. Transformers' torch functions for the two
layers can neither reset a state between packed sequences nor bound their memory (C^2 K numbers per chunk in KDA's):
the tests compare with them.

Letters: B batch, T time, H heads, K key width, V value width, R = B H, n chunks of C tokens; X is K, or 1 for a decay
per head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..packing import Rows
from .kernels import fla_kernel, run_fla

DELTA_CHUNK = 64  # tokens; a short input is one shorter chunk
DELTA_SPAN = 256  # tokens between two states kept for the backward pass
WIDEST_KEY = 256  # of the kernels


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    rows: Rows,
    owner: str = "delta_rule",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule over T tokens, exact when a sequence comes in several calls.

    Args:
        query: (B, T, H', K) of any length, like the key; H' divides H, each serves that many value heads.
        key: (B, T, H', K).
        value: (B, T, H, V).
        log_decay: (B, T, H), or (B, T, H, K) per channel; at most 0.
        beta: (B, T, H).
        state: (B, H, K, V) of the sequence in the first column.
        rows: padding changes no state; no state crosses from one packed sequence into the next.
        owner: the mixer, for the log.

    Returns:
        Output (B, T, H, V) in the dtype of `value`, and the state of the last column's sequence, at least fp32.
    """
    if rows.mask is not None:  # without beta nothing is written, without decay nothing is lost
        beta, log_decay = rows.keep(beta), rows.keep(log_decay)
    with torch.autocast(query.device.type, enabled=False):
        if kernel := delta_kernel(query, log_decay, owner):
            named = {"q": query, "k": key, "v": value, "g": log_decay.float(), "beta": beta}
            scale = query.shape[-1] ** -0.5
            return run_fla(kernel, named, state, rows.segments, scale=scale, use_qk_l2norm_in_kernel=True)
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
        inputs = query, key, value, log_decay, beta[..., None], state
        if query.shape[1] == 1:
            return delta_step(*inputs)
        return ChunkedDeltaRule.apply(*inputs, sequence_numbers(rows))


def delta_kernel(query: torch.Tensor, log_decay: torch.Tensor, owner: str) -> Callable[..., Any] | None:
    """The kernel of flash-linear-attention for such inputs, if there is one."""
    per_channel, one_token = log_decay.ndim == 4, query.shape[1] == 1
    if query.shape[-1] > WIDEST_KEY or (one_token and torch.is_grad_enabled()):  # no gradient for a single token
        return None
    module, rule = ("fla.ops.kda", "kda") if per_channel else ("fla.ops.gated_delta_rule", "gated_delta_rule")
    return fla_kernel(owner, module, f"{'fused_recurrent' if one_token else 'chunk'}_{rule}", query)


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """Values in the precision of the rule: fp32, or what is finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def delta_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule for one token: T = 1."""
    query, key = (unit(at_least_fp32(x)).repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query, key))
    q, k, g = (at_least_fp32(x).movedim(1, -1) for x in (query, key, log_decay))  # columns (B, H, X, 1)
    v, b = (at_least_fp32(x).transpose(1, 2) for x in (value, beta))  # rows (B, H, 1, X)
    state = at_least_fp32(state) * g.exp()
    state = state + k * (b * (v - k.mT @ state))
    output = q.mT @ state * query.shape[-1] ** -0.5
    return output.transpose(1, 2).to(value.dtype), state


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1; the epsilon is that of fla and Transformers."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class ChunkedDeltaRule(torch.autograd.Function):
    """`apply(query, key, value, log_decay (B, T, H, X), beta (B, T, H, 1), state, sequence_numbers(rows))`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, state, numbers = arguments
        state, states, output = at_least_fp32(state), [], inputs[2].new_empty(inputs[2].shape)
        for start in range(0, output.shape[1], DELTA_SPAN):
            span = slice(start, start + DELTA_SPAN)
            states.append(state)
            chunks = cut_span(inputs, numbers, span)
            solution = solve_chunks(chunks, state)
            from_chunks(read_chunks(chunks, solution), output[:, span])
            state = solution.last
        ctx.save_for_backward(*inputs, numbers, *states)
        ctx.state_dtype = arguments[5].dtype
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, value, log_decay, beta, numbers, *states = ctx.saved_tensors
        inputs, (output, state) = [query, key, value, log_decay, beta], gradients
        totals = [x.new_empty(x.shape) for x in inputs]
        with torch.autocast(output.device.type, enabled=False):
            for index in reversed(range(len(states))):
                span = slice(index * DELTA_SPAN, (index + 1) * DELTA_SPAN)
                chunks = cut_span(inputs, numbers, span)
                solution = solve_chunks(chunks, states[index])
                arriving = to_chunks(output[:, span], chunks.key.shape[-2])
                *leaving, state = differentiate_chunks(chunks, solution, arriving, state)
                leaving[0] = leaving[0] * query.shape[-1] ** -0.5
                for i in (0, 1):
                    vectors = to_chunks(inputs[i][:, span], chunks.key.shape[-2])
                    leaving[i] = differentiate_unit(vectors, leaving[i].unflatten(1, (vectors.shape[1], -1)).sum(2))
                for total, gradient in zip(totals, leaving):
                    from_chunks(gradient, total[:, span])
        return *totals, state.to(ctx.state_dtype), None


class DeltaChunks(NamedTuple):
    """A span of tokens, cut into n chunks."""

    query: torch.Tensor  # (n, R, C, K)
    key: torch.Tensor  # (n, R, C, K)
    value: torch.Tensor  # (n, R, C, V)
    log_decay: torch.Tensor  # (n, R, C, X)
    beta: torch.Tensor  # (n, R, C, 1)
    rise: torch.Tensor  # (n, R, C, X) exp(G), 0 where the incoming state is another sequence's
    fall: torch.Tensor  # (n, R, C, X) exp(G_end - G), 0 where the outgoing state is another sequence's
    decay: torch.Tensor  # (n, R, X, 1) exp(G_end), 0 where a sequence begins in between
    lower: torch.Tensor  # (C, C) or (n, R, C, C) True where token i reads token j


class DeltaSolution(NamedTuple):
    """What solving the chunks one after the other gives."""

    reads: torch.Tensor  # (n, R, C, C) A(q)
    overlaps: torch.Tensor  # (n, R, C, C) strict_tril(A(k))
    inverse: torch.Tensor  # (n, R, C, C) (I + L)^-1
    new_values: torch.Tensor  # (n, R, C, V) U
    new_keys: torch.Tensor  # (n, R, C, K) W
    errors: torch.Tensor  # (n, R, C, V) E
    states: torch.Tensor  # (n, R, K, V) before each chunk
    last: torch.Tensor  # (B, H, K, V) after all of them


def cut_span(inputs: list[torch.Tensor], numbers: torch.Tensor | None, span: slice) -> DeltaChunks:
    """The columns in `span` of query, key, value, log-decay and beta."""
    heads, time = inputs[2].shape[2], inputs[2][:, span].shape[1]
    size = next(c for c in (2, 4, 8, 16, 32, DELTA_CHUNK) if c >= min(time, DELTA_CHUNK))
    query, key, value, log_decay, beta = (to_chunks(x[:, span], size) for x in inputs)
    query, key = (unit(x).repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    total = log_decay.cumsum(-2)
    rise, fall, decay = total.exp(), sums_after(log_decay).exp(), total[..., -1:, :].exp().mT
    lower = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    if numbers is not None:
        enters, leaves, passes, same = sequence_masks(numbers[:, span.start : span.start + time + 1], size, heads)
        rise, fall, decay, lower = rise * enters, fall * leaves, decay * passes, lower & same
    return DeltaChunks(query, key, value, log_decay, beta, rise, fall, decay, lower)


def sequence_masks(numbers: torch.Tensor, size: int, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, 1 + T) numbers, the first that of the state before the chunks -> four masks.

    Returns:
        Which tokens are of the state before their chunk's sequence (n, R, C, 1), which of that of the state after it,
        whether these two are the same one (n, R, 1, 1), and which pairs of tokens are of one sequence (n, R, C, C).
    """
    numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, (1 - numbers.shape[1]) % size)], 1)
    token = numbers[:, 1:].unflatten(1, (-1, size)).transpose(0, 1).repeat_interleave(heads, 1)[..., None]
    before = numbers[:, :-1:size].T.repeat_interleave(heads, 1)[..., None, None]
    after = token[..., -1:, :]
    return token == before, token == after, before == after, token == token.mT


def solve_chunks(c: DeltaChunks, state: torch.Tensor) -> DeltaSolution:
    """Solve the triangular systems of all chunks at once, then pass the state from chunk to chunk."""
    reads, overlaps = decayed_products(c)
    overlaps = overlaps.tril(-1)
    identity = torch.eye(overlaps.shape[-1], dtype=overlaps.dtype, device=overlaps.device).expand_as(overlaps)
    inverse = torch.linalg.solve_triangular(c.beta * overlaps, identity, upper=False, unitriangular=True)
    new_values, new_keys = inverse @ (c.beta * c.value), inverse @ (c.beta * c.key * c.rise)
    to_state, last, errors, states = (c.key * c.fall).mT, state.flatten(0, 1), [], []
    for i in range(len(new_values)):
        states.append(last)
        errors.append(torch.baddbmm(new_values[i], new_keys[i], last, alpha=-1))
        last = torch.baddbmm(c.decay[i] * last, to_state[i], errors[i])
    errors, states = torch.stack(errors), torch.stack(states)
    return DeltaSolution(reads, overlaps, inverse, new_values, new_keys, errors, states, last.view_as(state))


def read_chunks(c: DeltaChunks, solution: DeltaSolution) -> torch.Tensor:
    """What the queries read: O (n, R, C, V)."""
    return (c.query * c.rise) @ solution.states + solution.reads @ solution.errors


def differentiate_chunks(
    c: DeltaChunks, s: DeltaSolution, d_output: torch.Tensor, d_last: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of O (n, R, C, V) and of the last state (B, H, K, V) -> those of the five inputs and the first state.

    The decays need no pass of their own: dG_i = q_i dq_i + k_i (dk_i as a row - dk_i as a column), plus G_end's.
    """
    to_state, from_state = c.key * c.fall, c.key * c.rise
    d_errors, d_states = s.reads.mT @ d_output, (c.query * c.rise).mT @ d_output
    d_after, d_state = [], d_last.flatten(0, 1).to(d_output.dtype)
    for i in reversed(range(len(d_errors))):
        d_after.append(d_state)
        d_errors[i].baddbmm_(to_state[i], d_state)
        d_state = torch.baddbmm(d_states[i] + c.decay[i] * d_state, s.new_keys[i].mT, d_errors[i], alpha=-1)
    d_after = torch.stack(d_after[::-1])
    d_values = s.inverse.mT @ d_errors  # of diag(beta) V
    d_keys = s.inverse.mT @ (d_errors @ -s.states.mT)  # of diag(beta) K exp(G)
    d_system = (d_values @ s.new_values.mT + d_keys @ s.new_keys.mT).tril(-1).neg()  # of L
    d_beta = (d_values * c.value).sum(-1) + (d_keys * from_state).sum(-1) + (d_system * s.overlaps).sum(-1)
    d_query, d_row, d_column = differentiate_products(c, d_output @ s.errors.mT, c.beta * d_system)
    d_query += d_output @ s.states.mT * c.rise
    d_row += c.beta * d_keys * c.rise
    d_leaving = s.errors @ d_after.mT * c.fall
    d_column += d_leaving
    d_total = c.query * d_query + c.key * (d_row - d_column)
    d_total[..., -1, :] += (c.key * d_leaving).sum(-2) + (c.decay * s.states * d_after).sum(-1)
    d_total = d_total.sum_to_size(c.log_decay.shape)
    d_log_decay = d_total.flip(-2).cumsum(-2).flip(-2)
    d_state = d_state.view_as(d_last)
    return d_query, d_row + d_column, c.beta * d_values, d_log_decay, d_beta[..., None], d_state


def differentiate_unit(vectors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of `unit(vectors)` -> that of the vectors: what is orthogonal to them, over their length."""
    scale = (vectors.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    vectors = vectors * scale
    return scale * (gradient - vectors * (vectors * gradient).sum(-1, keepdim=True))


def decayed_products(c: DeltaChunks) -> tuple[torch.Tensor, torch.Tensor]:
    """A(q) and A(k): (n, R, C, C), zero above the diagonal and between sequences."""
    if c.log_decay.shape[-1] == 1:
        decay = decay_of_pairs(c)
        return c.query @ c.key.mT * decay, c.key @ c.key.mT * decay
    reads = torch.diag_embed((c.query * c.key).sum(-1))
    overlaps = torch.diag_embed((c.key * c.key).sum(-1))
    for half in block_halves(c):
        queries, keys, columns, *_ = decay_to_border(c, half)
        lower_quarters(reads, half).copy_((queries @ columns.mT).movedim(2, -1))
        lower_quarters(overlaps, half).copy_((keys @ columns.mT).movedim(2, -1))
    return reads * c.lower, overlaps * c.lower


def differentiate_products(
    c: DeltaChunks, d_reads: torch.Tensor, d_overlaps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A(q) and of strict_tril(A(k)) -> those of the queries and of the keys, as rows and as columns."""
    d_reads = d_reads * c.lower
    if c.log_decay.shape[-1] == 1:
        decay = decay_of_pairs(c)
        d_reads, d_overlaps = d_reads * decay, d_overlaps * decay
        return d_reads @ c.key, d_overlaps @ c.key, d_reads.mT @ c.query + d_overlaps.mT @ c.key
    d_overlaps = d_overlaps * c.lower
    d_self = d_reads.diagonal(dim1=-2, dim2=-1)[..., None]
    d_query, d_row, d_column = d_self * c.key, torch.zeros_like(c.key), d_self * c.query
    for half in block_halves(c):
        queries, keys, columns, rise, fall = decay_to_border(c, half)
        from_reads, from_overlaps = (lower_quarters(x, half).movedim(-1, 2) for x in (d_reads, d_overlaps))
        split_blocks(d_query, half)[..., 1, :, :] += from_reads @ columns * rise
        split_blocks(d_row, half)[..., 1, :, :] += from_overlaps @ columns * rise
        split_blocks(d_column, half)[..., 0, :, :] += (from_reads.mT @ queries + from_overlaps.mT @ keys) * fall
    return d_query, d_row, d_column


def decay_of_pairs(c: DeltaChunks) -> torch.Tensor:
    """exp(G_i - G_j) (n, R, C, C) of a decay per head, where token i reads token j, else 0."""
    size = c.log_decay.shape[-2]
    between = c.log_decay.expand(-1, -1, -1, size).tril(-1).cumsum(-2)
    return between.masked_fill(~c.lower, float("-inf")).exp()


def block_halves(c: DeltaChunks) -> list[int]:
    """Half the sizes of the blocks on the diagonal: C/2, ..., 2, 1.

    The lower left quarters of all these blocks are the whole strict triangle. In a quarter every row comes after every
    column, so with G_b at the border between them exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j), two factors that
    cannot overflow: a quarter is one matrix product.
    """
    size = c.key.shape[-2]
    return [size >> level for level in range(1, size.bit_length())]


def decay_to_border(c: DeltaChunks, half: int) -> tuple[torch.Tensor, ...]:
    """Queries and keys as rows, keys as columns, all (n, R, m, half, K) and decayed, and the decays of both."""
    query, key, log_decay = (split_blocks(x, half) for x in (c.query, c.key, c.log_decay))
    rise, fall = log_decay[..., 1, :, :].cumsum(-2).exp(), sums_after(log_decay[..., 0, :, :]).exp()
    return query[..., 1, :, :] * rise, key[..., 1, :, :] * rise, key[..., 0, :, :] * fall, rise, fall


def sums_after(values: torch.Tensor) -> torch.Tensor:
    """(..., C, X) -> the sum of all later rows: G_end - G, but exact where G itself has become too large for that."""
    return F.pad(values[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def split_blocks(values: torch.Tensor, half: int) -> torch.Tensor:
    """(n, R, C, K) -> (n, R, m, 2, half, K)."""
    return values.unflatten(2, (-1, 2, half))


def lower_quarters(products: torch.Tensor, half: int) -> torch.Tensor:
    """(n, R, C, C) -> (n, R, half, half, m): the lower left quarters of the m blocks on the diagonal, a view."""
    blocks = products.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))  # (n, R, m, 2, half, m, 2, half)
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)


def sequence_numbers(rows: Rows) -> torch.Tensor | None:
    """(B, 1 + T) the number of each column's sequence, after that of the incoming state; None if all are one."""
    if rows.segments is None:
        return None
    return F.pad((rows.segments.diff(dim=1) != 0).long().cumsum(1), (2, 0))


def to_chunks(values: torch.Tensor, size: int) -> torch.Tensor:
    """(B, T, H, X) -> chunks (n, R, C, X), at least fp32, with zeros after the last token."""
    values = F.pad(values, (0, 0, 0, 0, 0, -values.shape[1] % size))
    values = values.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)
    return at_least_fp32(values).contiguous().flatten(1, 2)


def from_chunks(chunks: torch.Tensor, target: torch.Tensor) -> None:
    """The inverse of `to_chunks`: write (n, R, C, X) into (B, T, H, X)."""
    batch, time, heads, _ = target.shape
    values = chunks.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    target.copy_(values[:, :time])
