"""Grouped-query softmax attention, as in Llama, Mistral, Qwen2 and Qwen3.

Letters: B batch, T time, H query heads, d head width.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm, attend, rotary_embedding, rotary_width, rotate
from .base import Mixer, MixerOutput


class Attention(Mixer):
    """Softmax attention with `num_attention_heads` query heads over `num_key_value_heads` keys and values.

    Args:
        qk_norm: RMSNorm over each head's query and key before the rotation (Qwen3).
        qkv_bias: biases on the query, key and value projections (Qwen2).
        output_bias: a bias on the output projection.
        sliding: attend to the last `config.sliding_window` tokens only.
        rotary: rotate queries and keys by position; False is NoPE.
        partial_rotary_factor: share of each head that is rotated, from its first entry on (MiniMax: 0.5).
    """

    tp_plan = {
        **{f"{name}_proj": "colwise" for name in "qkv"},
        **{f"{name}_norm": "replicated_with_grad_allreduce" for name in "qk"},
        "o_proj": "rowwise",
    }

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        sliding: bool = False,
        rotary: bool = True,
        partial_rotary_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.rotary = config, layer_idx, True, rotary
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if sliding else None
        width, key_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.rotary_emb = rotary_embedding(config, rotary_width(config.head_dim, partial_rotary_factor))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    @classmethod
    def layer_type_of(cls, spec: dict[str, Any]) -> str:
        return "sliding_attention" if spec.get("sliding", False) else "full_attention"

    @classmethod
    def check(cls, config: Any, *, sliding: bool, rotary: bool, partial_rotary_factor: float, **options: Any) -> None:
        rotary_width(config.head_dim, partial_rotary_factor)
        if partial_rotary_factor != 1 and not rotary:
            raise ValueError("partial_rotary_factor has no effect with rotary=False; drop one of them.")
        if sliding and not config.sliding_window:
            raise ValueError("A mixer with sliding=True needs `sliding_window` set on the config, e.g. 4096.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        query, key, value = self.project(hidden_states, position_embeddings, **kwargs)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2).contiguous()), weights, None

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> queries (B, H, T, d), keys and values (B, H / groups, T, d), rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        if self.rotary:
            query, key = rotate(query, key, *position_embeddings)
        return query, key, value
