"""Which tokens of a row belong together: padding, and several sequences packed into one row.

Letters: B batch, T time of this forward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function


class Rows(NamedTuple):
    """What a recurrence must know about its rows besides the hidden states.

    A new sequence starts where `segments` changes from one column to the next: no state may cross. The state that
    comes in belongs to the sequence of the first column, the state that goes out to that of the last one.
    """

    mask: torch.Tensor | None = None  # (B, T) False for padding, wherever it stands
    segments: torch.Tensor | None = None  # (B, T) ascending ids; None: every row is one sequence
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and sines (B or 1, T, head_dim)

    def cut(self, start: int, stop: int) -> "Rows":
        """The columns from `start` to `stop`."""
        mask, segments = (None if x is None else x[:, start:stop] for x in (self.mask, self.segments))
        tables = self.position_embeddings
        return Rows(mask, segments, tables and (tables[0][:, start:stop], tables[1][:, start:stop]))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """Apply a function to everything that has one row per sequence."""
        tables = self.position_embeddings
        if tables is not None and tables[0].shape[0] > 1:
            tables = (change(tables[0]), change(tables[1]))
        return Rows(
            self.mask if self.mask is None else change(self.mask),
            self.segments if self.segments is None else change(self.segments),
            tables,
        )

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (B, T, ...) with zeros at the padding."""
        if self.mask is None:
            return values
        return values * self.mask.view(*self.mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)


def find_segments(
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Find the sequences that are packed into each row.

    Args:
        inputs_embeds: (B, T, D).
        attention_mask: (B, S) with the last T columns for these tokens. Whoever hands over ready masks of another kind
            has decided what may look at what; `position_ids` are then not searched for sequences.
        position_ids: (B or 1, T); a jump between two real tokens starts a new sequence, as in Transformers.
        past_key_values: the cache; packed rows can neither continue one nor fill one.
        cu_seq_lens_q: (n + 1,) ends of the sequences over the flattened rows, as TRL sends them for flash attention.
        seq_idx: (B, T) ids, as TRL sends them for Mamba's kernels.

    Returns:
        (B, T) ids that ascend along a row, or None if no row holds more than one sequence. While a graph is traced the
        content is unknown: then there are ids whenever there is something to derive them from.
    """
    batch, time = inputs_embeds.shape[:2]
    ready = attention_mask is not None and padding_mask(attention_mask, time) is None
    if seq_idx is not None:
        starts = seq_idx.diff(dim=1) != 0
    elif cu_seq_lens_q is not None:
        columns = torch.arange(batch * time, device=cu_seq_lens_q.device)
        ids = torch.searchsorted(cu_seq_lens_q[1:-1].contiguous(), columns, right=True)
        starts = ids.view(batch, time).diff(dim=1) != 0
    elif position_ids is None or time == 1 or ready or (is_compiling() and past_key_values is not None):
        return None
    else:
        starts = jumps(position_ids, padding_mask(attention_mask, time))
    if not is_compiling() and not starts.any():
        return None
    if past_key_values is not None:
        raise ValueError(
            "These rows hold several packed sequences (position_ids, cu_seq_lens_q or seq_idx say so), which can "
            "neither continue nor fill a cache: run them without past_key_values."
        )
    return F.pad(starts.long().cumsum(1), (1, 0)).expand(batch, time).to(inputs_embeds.device)


def jumps(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T - 1) real tokens that do not continue the real token before them."""
    if mask is None:
        return position_ids.diff(dim=1) != 1
    position_ids, columns = position_ids.expand(mask.shape), torch.arange(mask.shape[1], device=mask.device)
    latest = columns.where(mask, -1).cummax(1).values[:, :-1]  # the column of the last real token before, or -1
    before = position_ids.gather(1, latest.clamp(min=0))
    return mask[:, 1:] & (latest >= 0) & (position_ids[:, 1:] != before + 1)


def padding_mask(attention_mask: Any, time: int) -> torch.Tensor | None:
    """(B, T) which of the last `time` tokens are real, if `attention_mask` is a plain two-dimensional one."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -time:].bool()


def positions_of(
    segments: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Any = None
) -> torch.Tensor:
    """(B or 1, T) position of each token in its own sequence, counted on from the cache."""
    columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    if segments is None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (columns + seen)[None]
    starts = F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
    return columns - columns.where(starts, 0).cummax(1).values


def layer_masks(
    config: Any,
    attention_mask: Any,
    inputs_embeds: torch.Tensor,
    past_key_values: Any,
    position_ids: torch.Tensor,
    segments: torch.Tensor | None,
) -> dict[str, Any]:
    """One mask per layer type; `generate` with a static cache hands them over ready-made."""
    if isinstance(attention_mask, dict):
        return attention_mask
    if past_key_values is not None and "sliding_attention" in config.layer_types:
        check_window(attention_mask, config.sliding_window)
    packed: dict[str, Any] = {}
    if segments is not None and attention_mask is not None:
        packed = {"and_mask_function": packed_sequence_mask_function(segments)}
    elif segments is not None:  # Transformers finds them itself, and would not expect them in a mask function too
        position_ids = positions_of(segments, inputs_embeds)
    masks: Any = create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids, **packed
    )
    return masks  # a dict, since our configs have `layer_types`


def mask_for_flash(attention_mask: Any, segments: torch.Tensor, has_lengths: bool) -> Any:
    """The mask with which flash attention tells packed sequences apart: none, for it does so without padding only.

    Args:
        attention_mask: (B, T) or None.
        segments: (B, T).
        has_lengths: whether `cu_seq_lens_q`, over all rows, was given.

    Raises:
        ValueError: it would silently let sequences look at each other.
    """
    if is_compiling():  # nobody knows whether there are several sequences at all
        return attention_mask
    padded = attention_mask is not None and not attention_mask.all()
    if padded or (segments.shape[0] > 1 and not has_lengths):
        raise ValueError(
            "Flash attention cannot keep packed sequences apart in rows with padding, nor in several rows without "
            "`cu_seq_lens_q`: pack everything into one row, or load the model with attn_implementation='sdpa'."
        )
    return None


def check_window(attention_mask: Any, sliding_window: int) -> None:
    """A sliding cache keeps the last columns, whatever stands in them.

    Raises:
        ValueError: padding between the real tokens of a row would push real tokens out of the window.
    """
    if padding_mask(attention_mask, 1) is None or attention_mask.shape[1] <= sliding_window or is_compiling():
        return
    real = attention_mask.bool()
    padding = ~real & (real.cumsum(1) > 0)
    if (real & (padding.cumsum(1) > 0)).any():
        raise ValueError(
            "Sliding-window attention cannot continue rows that are padded on the right: pad the prompts on the left "
            "(tokenizer.padding_side = 'left')."
        )
