"""The cache of mixers that keep a recurrent state and nothing else.

Transformers' own `linear_attention` layer (5.23) learns that it holds a state from its convolution, never counts
tokens, and cannot repeat or select rows; this one needs no convolution and does all three, so that `generate` also
works when every layer is recurrent. A mixer names it by `layer_type = "recurrent"`.
"""

from typing import Any

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """States of fixed size (B, ...), replaced by every forward pass, and the number of tokens that they have seen."""

    _layer_type = "recurrent"  # registers the class with DynamicCache

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.cumulative_length = 0

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, num_tokens: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Replace a state; `num_tokens` is how many tokens this pass read, to be given with one state only."""
        self.device, self.dtype = recurrent_states.device, recurrent_states.dtype
        state = super().update_recurrent_state(recurrent_states, state_idx)
        self.has_previous_state[state_idx] = True
        self.cumulative_length += num_tokens
        return state

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A recurrent layer keeps no keys and values; use update_recurrent_state.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, as beam search and several samples per prompt need."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self._map(lambda state: state[indices.to(state.device), ...])

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A recurrent state cannot forget its last tokens; decode without an assistant model or prompt lookup."
        )

    def _map(self, change: Any) -> None:
        for index, initialized in self.is_recurrent_states_initialized.items():
            if initialized:
                self.recurrent_states[index] = change(self.recurrent_states[index])


STATIC_LAYER_TYPE_MAPPING["recurrent"] = RecurrentLayer  # its size never changes: the same class serves both
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["recurrent"] = create_recurrent_attention_mask
