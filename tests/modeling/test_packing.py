"""Which tokens belong together, from whatever the caller says about it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe.modeling.packing import Rows, find_segments, mask_for_flash, positions_of

EMBEDS = torch.zeros(1, 9, 4)
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_three_ways_say_the_same(lengths):
    time = sum(lengths)
    embeds = torch.zeros(1, time, 4)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    found = [
        find_segments(embeds, None, position_ids),
        find_segments(embeds, None, None, cu_seq_lens_q=ends),
        find_segments(embeds, None, None, seq_idx=ids.int()),
        find_segments(embeds, torch.ones(1, time), position_ids),
    ]
    if len(lengths) == 1:
        assert found == [None] * 4
    else:
        assert all(torch.equal(segments, ids) for segments in found)
        assert torch.equal(positions_of(ids, embeds), position_ids)


def test_several_rows_share_the_ends():
    ends = torch.tensor([0, 2, 9, 14, 18], dtype=torch.int32)
    segments = find_segments(EMBEDS.expand(2, -1, -1), None, None, cu_seq_lens_q=ends)
    assert segments.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "position_ids,mask",
    [
        ([1, 1, 1, 0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1, 1, 1, 1]),  # generate's left padding
        ([0, 1, 2, 3, 4, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0]),  # and right padding
        ([5, 6, 7, 8, 9, 10, 11, 12, 13], [1] * 9),  # a later chunk
    ],
)
def test_padding_starts_no_sequence(position_ids, mask):
    assert find_segments(EMBEDS, torch.tensor([mask]), torch.tensor([position_ids])) is None


def test_ready_masks_are_left_alone():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    assert find_segments(EMBEDS, torch.ones(1, 1, 9, 9), position_ids) is None
    assert find_segments(EMBEDS, {"full_attention": None}, position_ids) is None


def test_flash_attention_refuses_what_it_would_mix():
    segments = torch.tensor([[0, 0, 1, 1]])
    assert mask_for_flash(None, segments, False) is None
    assert mask_for_flash(torch.ones(1, 4), segments, False) is None
    assert mask_for_flash(None, segments.expand(2, -1), True) is None
    with pytest.raises(ValueError, match="sdpa"):
        mask_for_flash(torch.tensor([[1, 1, 1, 0]]), segments, False)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        mask_for_flash(None, segments.expand(2, -1), False)


def test_flash_attention_keeps_its_mask_while_a_graph_is_traced():
    """There are segments for every traced batch, most of which are padded and not packed."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    compiled = torch.compile(lambda m, s: mask_for_flash(m, s, False), backend="eager", fullgraph=True)
    assert torch.equal(compiled(mask, torch.zeros(2, 4, dtype=torch.long)), mask)


def test_rows_can_be_cut_and_mapped():
    rows = Rows(torch.eye(4).bool(), torch.arange(16).view(4, 4), (torch.rand(1, 4, 2), torch.rand(1, 4, 2)))
    part = rows.cut(1, 3).map(lambda x: x[[2, 0]])
    assert part.mask.tolist() == [[False, True], [False, False]] and part.segments.tolist() == [[9, 10], [1, 2]]
    assert torch.equal(part.position_embeddings[1], rows.position_embeddings[1][:, 1:3])
    assert rows.keep(torch.ones(4, 4, 3)).sum() == 12
