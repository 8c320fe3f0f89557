"""The delta rule against the recurrence token by token: every pattern of padding and packing, every way to train."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from hf_moe.modeling.ops import kernels
from hf_moe.modeling.ops.delta_rule import DELTA_SPAN, delta_rule
from hf_moe.modeling.packing import Rows

PLAIN = Rows()
KINDS = ("per_head", "per_channel")


def make(kind, time, batch=2, heads=2, groups=1, key=3, value=2, dtype=torch.float64, seed=0):
    """Query, key, value, log-decay, beta and state, all leaves."""
    torch.manual_seed(seed)
    query = torch.randn(batch, time, heads // groups, key)
    keys = torch.randn(batch, time, heads // groups, key)
    decay = -torch.rand(batch, time, heads, key) * 10 ** torch.randint(-2, 2, (batch, time, heads, 1))
    tensors = (
        query,
        keys,
        torch.randn(batch, time, heads, value),
        decay if kind == "per_channel" else decay[..., 0],
        2 * torch.rand(batch, time, heads),
        torch.randn(batch, heads, key, value),
    )
    return [x.to(dtype).requires_grad_() for x in tensors]


def naive(query, key, value, log_decay, beta, state, rows=PLAIN):
    """S' = diag(exp(g)) S, S = S' + k beta (v - k^T S')^T, o = S^T q for unit k and q / sqrt(K), token by token."""
    outputs, states = [], []
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query / query.shape[-1] ** 0.5, key))
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            s = state[b, h]
            for t in range(query.shape[1]):
                if t and rows.segments is not None and rows.segments[b, t] != rows.segments[b, t - 1]:
                    s = torch.zeros_like(s)
                if rows.mask is None or rows.mask[b, t]:
                    s = torch.diag(log_decay[b, t, h].exp().expand(len(s))) @ s
                    s = s + torch.outer(key[b, t, h], beta[b, t, h] * (value[b, t, h] - key[b, t, h] @ s))
                outputs.append(query[b, t, h] @ s)
            states.append(s)
    batch, time, heads = query.shape[:3]
    return torch.stack(outputs).view(batch, heads, time, -1).transpose(1, 2), torch.stack(states).view(state.shape)


def train(rule, inputs, real=None):
    """Output, state and all gradients of one loss."""
    output, state = rule(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    weights = weights if real is None else weights * real[..., None, None]
    loss = (output * weights).sum() + (state * torch.linspace(1, 2, state.numel()).view(state.shape)).sum()
    return [(output * weights).detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("time,groups", [(1, 1), (1, 2), (2, 1), (7, 2), (64, 1), (65, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_recurrence(kind, time, groups):
    inputs = make(kind, time, heads=4, groups=groups)
    close(train(lambda *x: delta_rule(*x, PLAIN), inputs), train(naive, inputs))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_padding_and_packing(kind, data):
    time = data.draw(st.integers(1, 80))
    flags = st.lists(st.booleans(), min_size=time, max_size=time)
    starts = torch.tensor([data.draw(flags), data.draw(flags)])
    sparse = data.draw(st.booleans())  # long sequences too
    starts &= (torch.arange(time) % 23 == 0) if sparse else torch.ones(time).bool()
    mask = torch.tensor([data.draw(flags), data.draw(flags)]) if data.draw(st.booleans()) else None
    rows = Rows(mask, starts.long().cumsum(1))
    inputs = make(kind, time)
    close(train(lambda *x: delta_rule(*x, rows), inputs, mask), train(lambda *x: naive(*x, rows=rows), inputs, mask))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind, packed):
    """Over several spans, cut anywhere: next to a border of sequences or chunks too."""
    *inputs, state = make(kind, 1100, batch=1, heads=1)
    segments = torch.zeros(1, 1100, dtype=torch.long)
    for number, start in enumerate((100, 256, 512, 513, 700)):
        segments[:, start:] = number + 1

    def pieces(*tensors):
        *inputs, carried = tensors
        outputs = []
        for start, stop in ((0, 100), (100, 101), (101, 800), (800, 1100)):
            ids = segments[:, start:stop] if packed else None
            if packed and start and segments[0, start] != segments[0, start - 1]:
                carried = torch.zeros_like(carried)  # what a new sequence begins with is for the caller to say
            output, carried = delta_rule(*(x[:, start:stop] for x in inputs), carried, Rows(None, ids))
            outputs.append(output)
        return torch.cat(outputs, 1), carried

    rows = Rows(None, segments) if packed else PLAIN
    close(train(lambda *x: delta_rule(*x, rows), [*inputs, state]), train(pieces, [*inputs, state]), 1e-9)


@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize(
    "kind,native", [("per_head", torch_chunk_gated_delta_rule), ("per_channel", chunk_kimi_delta_attention)]
)
def test_equals_transformers(kind, native):
    inputs = make(kind, 130, key=8, value=8, dtype=torch.float32)

    def theirs(query, key, value, log_decay, beta, state):
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return native(query, key, value, g=log_decay, beta=beta, **options)

    close(train(lambda *x: delta_rule(*x, PLAIN), inputs), train(theirs, inputs), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_decays(kind):
    """From none at all to forgetting everything at once: in fp32 nothing overflows or is lost afterwards."""
    inputs = make(kind, 100, dtype=torch.float32)
    with torch.no_grad():
        inputs[3].copy_(-(10 ** (8 * torch.rand_like(inputs[3]) - 4)))
        inputs[3][:, 40:50] = 0
        inputs[3][:, 60], inputs[3][:, 70] = -1e30, -torch.inf
    close(train(lambda *x: delta_rule(*x, PLAIN), inputs), train(naive, inputs), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_train(kind):
    inputs = make(kind, 70, dtype=torch.float32)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :3] = False
    rows = Rows(mask, (torch.arange(70) > 30).long().expand(2, -1))

    def rule(*tensors):
        return delta_rule(*tensors, rows)

    expected = train(rule, inputs)
    close(train(torch.compile(rule, fullgraph=True, backend="eager"), inputs), expected, 0)
    close(train(lambda *x: checkpoint(rule, *x, use_reentrant=False), inputs), expected, 0)
    with torch.autocast("cpu", torch.bfloat16):  # sums over all of time stay in fp32
        close(train(rule, inputs), expected, 0)
    output, state = checkpoint(rule, *inputs, use_reentrant=True)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output * weights).sum().add((state * torch.linspace(1, 2, state.numel()).view(state.shape)).sum()).backward()
    close([x.grad for x in inputs], expected[2:], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_can_be_taken_twice_from_one_graph_but_not_of_gradients(kind):
    inputs = make(kind, 9)
    output, _ = delta_rule(*inputs, PLAIN)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    close(torch.autograd.grad(output.sum(), inputs), first, 0)
    output, _ = delta_rule(*inputs, PLAIN)
    gradient = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("time", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, time):
    inputs = make(kind, time, dtype=torch.bfloat16)
    output, state = delta_rule(*inputs, PLAIN)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    gradients = torch.autograd.grad(output.float().sum() + state.sum(), inputs)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    exact = naive(*(x.double() for x in inputs))
    close([output.double(), state.double()], [*exact], 3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_inputs_and_one_state_per_span(kind):
    """What stays in memory for the backward pass."""
    inputs, saved = make(kind, 4 * DELTA_SPAN, batch=1), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        delta_rule(*inputs, PLAIN)
    assert sum(x.numel() for x in saved.values()) == sum(x.numel() for x in inputs[:5]) + 4 * inputs[5].numel()


def pretend_kernel(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens=None):
    """A kernel with fla's interface."""
    assert scale == 1.0 and output_final_state and initial_state.dtype == torch.float32
    if cu_seqlens is None:
        return delta_rule(q, k, v, g, beta, initial_state, PLAIN)
    assert q.shape[0] == 1 and len(initial_state) == len(cu_seqlens) - 1
    outputs, states = [], []
    for i, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        piece = (x[:, start:stop] for x in (q, k, v, g, beta))
        output, state = delta_rule(*piece, initial_state[i : i + 1], PLAIN)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_reach_a_kernel(kind, packed):
    inputs = make(kind, 20, dtype=torch.float32)
    segments = torch.zeros(2, 20, dtype=torch.long)
    segments[0, 4:], segments[0, 5:], segments[1, 19:] = 1, 2, 1
    segments = segments if packed else None

    def flat(*tensors):
        named = dict(zip(("q", "k", "v", "g", "beta"), tensors))
        return kernels.run_fla(pretend_kernel, named, tensors[-1], segments)

    close(train(flat, inputs), train(lambda *x: delta_rule(*x, Rows(None, segments)), inputs), 1e-5)


def test_says_once_what_runs(caplog):
    kernels.log_once.cache_clear()
    inputs = make("per_head", 4)
    with caplog.at_level(logging.INFO, "hf_moe"):
        for _ in range(2):
            delta_rule(*inputs, PLAIN, "SomeMixer")
    assert caplog.messages == ["SomeMixer runs on torch (its tensors are on cpu, kernels need CUDA)."]
