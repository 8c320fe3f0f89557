"""What every token mixer promises. Letters: B batch, T time, D width."""

from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from ..parts import Part


class Mixer(Part):
    """Mixes tokens: `forward(hidden_states (B, T, D), ...) -> (output (B, T, D), attention weights or None)`."""

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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError
