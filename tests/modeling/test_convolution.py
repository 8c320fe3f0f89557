"""The causal convolution against a loop over real tokens, in every way its rows can be cut, padded and packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe.modeling.ops.convolution import CausalConv1d
from hf_moe.modeling.packing import Rows

WIDTH, CHANNELS = 4, 3


def naive(conv, inputs, state, mask, segments):
    """One row: keep the real tokens of each sequence in a list, and look back over it."""
    past, current, outputs = list(state.T), None, []
    for t, x in enumerate(inputs):
        if mask[t]:
            if current is not None and segments[t] != current:
                past = [torch.zeros(CHANNELS, dtype=x.dtype)] * (WIDTH - 1)
            current = segments[t]
            past = [*past, x][-WIDTH:]
            output = sum(w * x for w, x in zip(conv.weight[:, 0].T, past)) + conv.bias
            past = past[1:]
        else:
            output = torch.full((CHANNELS,), float("nan"), dtype=x.dtype)
        outputs.append(output)
    return torch.stack(outputs), torch.stack(past).T


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=12),
    starts=st.lists(st.booleans(), min_size=12, max_size=12),
    packed=st.booleans(),
)
def test_equals_a_loop(kept, starts, packed):
    torch.manual_seed(0)
    time = len(kept)
    conv = CausalConv1d(CHANNELS, WIDTH, bias=True).double()
    inputs, state = torch.randn(1, time, CHANNELS).double(), torch.randn(1, CHANNELS, WIDTH - 1).double()
    mask = torch.tensor(kept)
    # a sequence starts at a real token that has a real token before it
    seen = torch.tensor([any(kept[:t]) for t in range(time)])
    segments = (torch.tensor(starts[:time]) & mask & seen & packed).long().cumsum(0)
    rows = Rows(None if mask.all() else mask[None], segments[None] if packed else None)
    output, after = conv(inputs, state, rows)
    expected, expected_after = naive(conv, inputs[0], state[0], kept, segments.tolist())
    torch.testing.assert_close(output[0, mask], expected[mask])
    torch.testing.assert_close(after[0], expected_after)


@pytest.mark.parametrize("cut", range(1, 9))
def test_can_be_cut_anywhere(cut):
    torch.manual_seed(0)
    conv, inputs = CausalConv1d(CHANNELS, WIDTH, bias=True), torch.randn(2, 9, CHANNELS)
    rows = Rows(torch.tensor([[True] * 9, [True] * 6 + [False] * 3]))
    whole, end = conv(inputs, conv.initial_state(inputs), rows)
    first, state = conv(inputs[:, :cut], conv.initial_state(inputs), rows.cut(0, cut))
    second, state = conv(inputs[:, cut:], state, rows.cut(cut, 9))
    torch.testing.assert_close(torch.cat([first, second], 1)[rows.mask], whole[rows.mask])
    torch.testing.assert_close(state, end)
