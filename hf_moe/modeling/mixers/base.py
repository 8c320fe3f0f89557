"""What every token mixer promises. Letters: B batch, T time, D width."""

from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..parts import Part

MixerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Mixer(Part):
    """Mixes tokens: `forward(hidden_states (B, T, D), ...) -> (output (B, T, D), attention weights, losses (3,))`.

    Attention weights are None where the kernel makes none, balance losses where nothing is routed or nobody asked.
    """

    layer_idx: int
    layer_type: ClassVar[str] = "full_attention"  # which Transformers cache and mask it uses

    @classmethod
    def layer_type_of(cls, spec: dict[str, Any]) -> str:
        """The layer type of this mixer with the options in `spec`."""
        return cls.layer_type

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        raise NotImplementedError
