"""The base of mixers that fold the past into states of fixed size.

A recurrence is one pure function, `scan`, that can be cut anywhere: prefill, chunks, single steps and replay after a
rollback are all the same call. Letters: B batch, T time, D width.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..cache import RecurrentLayer
from ..context import NO_CONTEXT, ForwardContext
from ..packing import Rows
from .base import Mixer, MixerOutput

RECORDED = 256  # tokens of one forward pass that a rollback can take back: no draft is longer, a prompt may be


class RecurrentMixer(Mixer):
    """Takes care of the cache and of the rows; a subclass has `initial_states` and `scan`."""

    layer_type = "recurrent"

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Zeros (B, ...), one tensor per state; what accumulates over time is float32."""
        raise NotImplementedError

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(B, T, D) and the states before it -> output (B, T, D) and the states after it.

        Padding changes no state, and no state crosses from one packed sequence into the next.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        mask = None if attention_mask is None else attention_mask.to(hidden_states.device).bool()
        segments = None if context.segments is None else context.segments.to(hidden_states.device)
        rows = Rows(mask, segments, position_embeddings)
        if past_key_values is None:
            return self.scan(hidden_states, self.initial_states(hidden_states), rows)[0], None, None
        layer: Any = past_key_values.layers[self.layer_idx]
        if not isinstance(layer, RecurrentLayer):
            raise ValueError(
                f"Layer {self.layer_idx} is recurrent, its cache is a {type(layer).__name__}: make the cache for this "
                "model, `DynamicCache(config=model.config)`."
            )
        time, early = hidden_states.shape[1], hidden_states.shape[1] - RECORDED
        if layer.record_past and early > 0:  # a long prompt: only its end can be taken back
            head = self.advance(hidden_states[:, :early], rows.cut(0, early), layer)
            tail = self.advance(hidden_states[:, early:], rows.cut(early, time), layer)
            return torch.cat([head, tail], 1), None, None
        return self.advance(hidden_states, rows, layer), None, None

    def advance(self, hidden_states: torch.Tensor, rows: Rows, layer: RecurrentLayer) -> torch.Tensor:
        """`scan` from the states in the cache, and leave the new ones there."""
        states = layer.states or self.initial_states(hidden_states)
        if cropped := layer.take_cropped():
            for inputs, their_rows in cropped:
                _, states = self.scan(inputs, states, their_rows)
            layer.write(states)
        output, states = self.scan(hidden_states, states, rows)
        layer.store(states, (hidden_states, rows))
        return output
