"""Cache layers and masks of our own, and what a cache weighs.

Transformers' `linear_attention` layer (5.23) learns that it holds a state from its convolution, never counts tokens,
cannot repeat or select rows, and cannot be cropped; `RecurrentLayer` does all of that for any number of states.
"""

from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    create_recurrent_attention_mask,
)

from .packing import Rows

Inputs = tuple[torch.Tensor, Rows]  # what a recurrent mixer read in one pass: hidden states (B, T, D) and their rows


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """States of fixed size (B, ...), replaced by every forward pass, and the number of tokens that they have seen.

    A state cannot forget. While `record_past` is on, the layer keeps the states before the recorded tokens and what
    the mixer read since; `crop` goes back to those states, and the mixer reads again what was not cropped.
    """

    _layer_type = "recurrent"  # registers the class with DynamicCache

    def __init__(self, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.cumulative_length = 0
        self.before: tuple[torch.Tensor, ...] = ()  # the states before `recorded`
        self.recorded: list[Inputs] = []
        self.is_cropped = False  # the states are those of `before`, `recorded` has to be read again

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        """The states in the order in which they were stored; nothing if no token has been seen."""
        return tuple(self.recurrent_states.values()) if self.has_previous_state[0] else ()  # pyright: ignore

    def take_cropped(self) -> list[Inputs]:
        """What must be read again from `states` before anything else; from then on the caller has taken care of it."""
        if not self.is_cropped:
            return []
        inputs, self.recorded, self.is_cropped = self.recorded, [], False
        return inputs

    def store(self, states: tuple[torch.Tensor, ...], inputs: Inputs) -> None:
        """Replace the states by those after `inputs`."""
        if not self.record_past:
            self.before, self.recorded = (), []
        else:
            if not self.recorded:
                self.before = tuple(state.clone() for state in self.states)
            self.recorded.append(inputs)
        self.write(states)
        self.cumulative_length += inputs[0].shape[1]

    def write(self, states: tuple[torch.Tensor, ...]) -> None:
        """Replace the states in place, for CUDA graphs, where autograd and shapes allow it."""
        for index, state in enumerate(states):
            if not self.is_recurrent_states_initialized.get(index):
                self.device, self.dtype = state.device, state.dtype
                self.is_conv_states_initialized[index] = False  # the base class counts on an entry
                self.lazy_initialization(recurrent_states=state, state_idx=index)
            held = self.recurrent_states[index]
            if state.requires_grad or held is None or held.requires_grad or held.shape != state.shape:
                self.recurrent_states[index] = state
            else:
                held.copy_(state)
            self.has_previous_state[index] = True
        self.number_of_states = len(self.recurrent_states)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A recurrent layer keeps no keys and values; use `store`.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        super().reset()
        self.before, self.recorded, self.is_cropped, self.cumulative_length = (), [], False, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, as several samples per prompt need."""
        self.map_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.map_rows(lambda state: state[indices.to(state.device), ...])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows of the batch, as beam search needs."""
        self.batch_select_indices(beam_idx)

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `abs(tokens_to_remove)` tokens; 0 makes all of them final."""
        if not self.record_past:
            raise ValueError(
                "A recurrent state cannot forget its last tokens unless it records them: call "
                "`cache.activate_past_recording()` before the tokens that may be cropped."
            )
        count, known = abs(tokens_to_remove), sum(hidden_states.shape[1] for hidden_states, _ in self.recorded)
        if count > known:
            raise ValueError(f"Cannot crop {count} tokens of a recurrent state: only the last {known} are recorded.")
        if count:
            self.recorded, self.is_cropped = list(without_last(self.recorded, count)), True
            self.go_back()
            self.cumulative_length -= count
        elif not self.is_cropped:
            self.before, self.recorded = (), []

    def go_back(self) -> None:
        """Put the states back to where they were before the recorded tokens."""
        self.write(self.before)
        if not self.before:
            LinearAttentionLayer.reset(self)

    def map_rows(self, change: Any) -> None:
        """Apply a function to everything that has one row per sequence."""
        for index, state in self.recurrent_states.items():
            self.recurrent_states[index] = None if state is None else change(state)
        self.before = tuple(map(change, self.before))
        self.recorded = [(change(hidden_states), rows.map(change)) for hidden_states, rows in self.recorded]


def without_last(pieces: list[Inputs], count: int) -> Any:
    """Yield the pieces without the last `count` tokens."""
    left = sum(hidden_states.shape[1] for hidden_states, _ in pieces) - count
    for hidden_states, rows in pieces:
        if left > 0:
            yield hidden_states[:, :left], rows.cut(0, left)
        left -= hidden_states.shape[1]


class MaskedLayer(DynamicLayer):
    """Keys and values of a mixer that computes its own scores."""

    _layer_type = "masked_attention"


class StaticMaskedLayer(StaticLayer):
    """The same, of fixed size."""

    _layer_type = "masked_attention"


class BooleanMasks:
    """What Transformers reads of a config to make the masks of `scaled_dot_product_attention`."""

    _attn_implementation, is_causal = "sdpa", True


def create_explicit_mask(
    config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """(B, 1, T, S) boolean, True where a token may look, whatever attention kernel the other layers use.

    Raises:
        ValueError: a ready mask that is not boolean, and does not say yes (0) or no (very negative) either.
    """
    if attention_mask is not None and getattr(attention_mask, "ndim", 4) == 4:  # a block mask has no `ndim`
        return as_boolean(attention_mask)
    return create_causal_mask(
        BooleanMasks,  # pyright: ignore[reportArgumentType] - stands in for a config
        inputs_embeds,
        attention_mask,
        *args,
        allow_is_causal_skip=False,
        **kwargs,
    )


def as_boolean(mask: Any) -> torch.Tensor:
    """A ready (B, 1, T, S) mask as yes or no."""
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        return mask
    if not isinstance(mask, torch.Tensor) or not (is_compiling() or ((mask == 0) | (mask <= -1e4)).all()):
        raise ValueError(
            "A mixer that chooses its keys needs a boolean mask (True: may look), or an additive one of 0 and very "
            "negative numbers: biases and flex attention's block masks cannot be honoured."
        )
    return mask == 0


def create_row_mask(config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """(B, T) which tokens are real, or None if all are.

    Raises:
        ValueError: a ready mask per pair of tokens, which a recurrence cannot honour.
    """
    if attention_mask is not None and getattr(attention_mask, "ndim", 4) != 2:
        raise ValueError(
            "Recurrent layers read a row from left to right and cannot honour a mask per pair of tokens: pass a "
            "two-dimensional padding mask, or tell packed sequences apart by position_ids."
        )
    return create_recurrent_attention_mask(config, inputs_embeds, attention_mask, **kwargs)


class CacheMemory(NamedTuple):
    """What a cache weighs for one sequence, in bytes."""

    per_token: float  # keys and values of one token, all layers
    per_sequence: int  # states of fixed size, all layers


def cache_memory(cache: Cache) -> CacheMemory:
    """Measure a filled cache: the tensors that it holds, for one row of the batch.

    A sliding or static layer counts as what one of its slots takes.
    """
    per_token, per_sequence = 0.0, 0
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            per_sequence += sum(state.nbytes // state.shape[0] for state in layer.states)
        elif getattr(layer, "is_initialized", False):
            slots = [x for x in (layer.keys, layer.values) if x is not None and x.numel()]  # pyright: ignore
            per_token += sum(x.nbytes / (x.shape[0] * x.shape[-2]) for x in slots)
    return CacheMemory(per_token, per_sequence)


STATIC_LAYER_TYPE_MAPPING["recurrent"] = RecurrentLayer  # its size never changes: the same class serves both
STATIC_LAYER_TYPE_MAPPING["masked_attention"] = StaticMaskedLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["recurrent"] = create_row_mask
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["masked_attention"] = create_explicit_mask
