"""Chunked linear attention against its recurrence, one token at a time: outputs, states and gradients."""

from itertools import pairwise

import pytest
import torch

from hf_moe.modeling.ops.linear_attention import CHUNK, linear_attention
from hf_moe.modeling.packing import Rows

B, H, K, V = 2, 3, 5, 4
TIMES = [1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
DECAYS = ["none", "constant", "token"]
LAYOUTS = ["plain", "padded", "packed", "both"]


def recurrence(query, key, value, state, rows, log_decay):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, told row by row, token by token, head by head."""
    outputs, states = [], []
    for b in range(query.shape[0]):
        line, current = [], [state[b, h] for h in range(query.shape[2])]
        for t in range(query.shape[1]):
            if t and rows.segments is not None and rows.segments[b, t] != rows.segments[b, t - 1]:
                current = [torch.zeros_like(s) for s in current]
            if rows.mask is None or rows.mask[b, t]:
                for h in range(query.shape[2]):
                    g = 0 if log_decay is None else (log_decay[h] if log_decay.ndim == 1 else log_decay[b, t, h])
                    current[h] = torch.exp(torch.as_tensor(g)) * current[h] + torch.outer(key[b, t, h], value[b, t, h])
            line.append(torch.stack([current[h].T @ query[b, t, h] for h in range(query.shape[2])]))
        outputs.append(torch.stack(line))
        states.append(torch.stack(current))
    return torch.stack(outputs), torch.stack(states)


def inputs(time, decay, dtype=torch.float64, strength=1.0):
    generator = torch.Generator().manual_seed(time)
    sizes = [(B, time, H, K), (B, time, H, K), (B, time, H, V), (B, H, K, V)]
    tensors = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    gates = {"none": None, "constant": (H,), "token": (B, time, H)}[decay]
    tensors.append(gates and -strength * torch.rand(gates, generator=generator, dtype=dtype))
    return [None if x is None else x.requires_grad_() for x in tensors]


def rows_of(layout, time):
    """Padding left, right and in the middle; sequences that start at a chunk's edge, before and behind it."""
    columns = torch.arange(time)
    mask = torch.stack([columns >= time // 3, (columns % 5 != 2) & (columns < time - 1)])
    if time == 1:
        mask = torch.tensor([[True], [False]])
    starts = torch.zeros(B, time, dtype=torch.long)
    starts[0, [t for t in (1, CHUNK, CHUNK + 1, time - 1) if 0 < t < time]] = 1
    starts[1, [t for t in (CHUNK - 1, 2 * CHUNK) if 0 < t < time]] = 1
    segments = starts.cumsum(1)
    return Rows(mask if layout in ("padded", "both") else None, segments if layout in ("packed", "both") else None)


def gradients(function, tensors, rows):
    *tensors, decay = tensors
    output, state = function(*tensors, rows, decay)
    if rows.mask is not None:  # what padding answers is nobody's business
        output = output * rows.mask[..., None, None]
    torch.manual_seed(0)
    leaves = [x for x in [*tensors, decay] if x is not None]
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in (output, state))
    return [output, state, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", TIMES)
def test_equals_the_recurrence(time, decay, layout):
    tensors, rows = inputs(time, decay), rows_of(layout, time)
    if time == 1:
        rows = rows._replace(segments=None)
    for ours, naive in zip(gradients(linear_attention, tensors, rows), gradients(recurrence, tensors, rows)):
        torch.testing.assert_close(ours, naive, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_spans_change_nothing(decay, layout, monkeypatch):
    time = 3 * CHUNK + 3
    tensors, rows = inputs(time, decay), rows_of(layout, time)
    together = gradients(linear_attention, tensors, rows)
    monkeypatch.setattr("hf_moe.modeling.ops.linear_attention.SPAN", 2 * CHUNK)
    for mine, expected in zip(gradients(linear_attention, tensors, rows), together):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_piece_by_piece_is_the_whole(decay, layout):
    time = 2 * CHUNK + 3
    query, key, value, state, gate = inputs(time, decay)
    rows = rows_of(layout, time)
    whole, last = linear_attention(query, key, value, state, rows, gate)
    outputs, start = [], 0
    for piece in (1, 3, CHUNK, 1, CHUNK - 2):
        part = slice(start, start + piece)
        if rows.segments is not None and start and (rows.segments[:, start] != rows.segments[:, start - 1]).any():
            changed = rows.segments[:, start] != rows.segments[:, start - 1]
            state = state * ~changed[:, None, None, None]  # the caller's part: it comes in for the first column
        cut = Rows(*(None if x is None else x[:, part] for x in rows[:2]))
        g = gate if gate is None or gate.ndim == 1 else gate[:, part]
        output, state = linear_attention(query[:, part], key[:, part], value[:, part], state, cut, g)
        outputs.append(output)
        start += piece
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state, last, atol=1e-10, rtol=1e-10)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """flash-linear-attention's kernel as its docstring has it: packed sequences lie in one row, a state for each."""
    assert scale == 1.0 and output_final_state and initial_state.dtype == torch.float32
    assert g_gamma is None or not g_gamma.requires_grad
    if cu_seqlens is None:
        return recurrence(q, k, v, initial_state, Rows(), g if g_gamma is None else g_gamma)
    assert len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1
    outputs, states = [], []
    for number, (start, stop) in enumerate(pairwise(cu_seqlens)):
        part = slice(start, stop)
        decay = g[:, part] if g is not None else g_gamma
        output, state = recurrence(q[:, part], k[:, part], v[:, part], initial_state[number, None], Rows(), decay)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_what_a_kernel_is_given(decay, layout, monkeypatch):
    """On CUDA with fla; that the real kernel does what its docstring says is for tests/gpu."""
    rows, (*tensors, gate) = rows_of(layout, CHUNK + 3), inputs(CHUNK + 3, decay, torch.float32)
    gate = gate.detach() if decay == "constant" else gate

    def both():
        output, state = linear_attention(*tensors, rows, gate)
        output = rows.keep(output)
        leaves = [x for x in (*tensors, gate) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(output.sin().sum() + state.cos().sum(), leaves)
        return output, state, *gradients

    expected = both()
    monkeypatch.setattr("hf_moe.modeling.ops.linear_attention.fla_kernel", lambda *_: chunk_simple_gla)
    for ours, torch_path in zip(both(), expected):
        torch.testing.assert_close(ours, torch_path, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("decay", ["constant", "token"])
def test_strong_decay_stays_finite(decay):
    """exp(-sum of decays) overflows float32 after two tokens here; the differences do not."""
    tensors = [x.detach().float().requires_grad_() for x in inputs(2 * CHUNK, decay, strength=100.0)]
    results = gradients(linear_attention, tensors, Rows())
    assert all(x.isfinite().all() for x in results)


def test_half_precision_accumulates_in_float32():
    tensors = [x.detach().bfloat16() for x in inputs(2 * CHUNK, "token")]
    with torch.autocast("cpu", torch.bfloat16):
        output, state = linear_attention(*tensors[:4], Rows(), tensors[4])
    assert output.dtype == state.dtype == torch.float32
    exact, last = linear_attention(*(x.double() for x in tensors[:4]), Rows(), tensors[4].double())
    torch.testing.assert_close(output.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.double(), last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_compiles_in_one_graph(decay, layout):
    tensors, rows = inputs(CHUNK + 3, decay), rows_of(layout, CHUNK + 3)
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    expected = linear_attention(*tensors[:4], rows, tensors[4])
    for ours, eager in zip(compiled(*tensors[:4], rows, tensors[4]), expected):
        torch.testing.assert_close(ours, eager)


def test_work_grows_with_time_and_never_token_by_token():
    """Operations per call depend on the number of chunks, not of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(time):
        tensors = [None if x is None else x.detach() for x in inputs(time, "constant")]
        with Counter() as counter:
            linear_attention(*tensors[:4], Rows(), tensors[4])
        return counter.calls

    assert calls(16 * CHUNK) - calls(8 * CHUNK) <= 8 * 4  # a few for each chunk's state
    assert calls(8 * CHUNK) < 100
