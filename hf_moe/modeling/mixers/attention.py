"""Grouped-query softmax attention, as in Llama, Mistral, Qwen2, Qwen3, OLMo 2 and Gemma 2 and 3.

Letters: B batch, T time, H query heads, d head width.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm, attend, check_rope_parameters, rotary_embedding, rotary_width, rotate
from .base import Mixer, MixerOutput

QK_NORMS = (False, True, "full")


class Attention(Mixer):
    """Softmax attention with `num_attention_heads` query heads over `num_key_value_heads` keys and values.

    Args:
        qk_norm: RMSNorm of queries and keys before the rotation: True for each head by itself (Qwen3, Gemma 3), "full"
            for all heads together (OLMo 2, OLMoE).
        qkv_bias: biases on the query, key and value projections (Qwen2).
        output_bias: a bias on the output projection.
        sliding: attend to the last `config.sliding_window` tokens only.
        rotary: rotate queries and keys by position; False is NoPE.
        partial_rotary_factor: share of each head that is rotated, from its first entry on (MiniMax: 0.5).
        rope_parameters: the mixer's own, e.g. `{"rope_type": "default", "rope_theta": 10000.0}` for Gemma 3's local
            layers; None means those of the model.
        logit_softcapping: c, which bounds the scores by `c tanh(score / c)` (Gemma 2: 50). Under `eager` and `sdpa`
            such layers run in plain torch, without a fused kernel.
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
        qk_norm: bool | str = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        sliding: bool = False,
        rotary: bool = True,
        partial_rotary_factor: float = 1.0,
        rope_parameters: dict[str, Any] | None = None,
        logit_softcapping: float | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.rotary = config, layer_idx, True, rotary
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if sliding else None
        self.softcap = logit_softcapping
        width, key_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        rotated = rotary_width(config.head_dim, partial_rotary_factor)
        self.rotary_emb = rotary_embedding(config, rotated, rope_parameters)
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=output_bias)
        self.norm_heads_apart = qk_norm != "full"
        norm_widths = (config.head_dim, config.head_dim) if self.norm_heads_apart else (width, key_width)
        self.q_norm, self.k_norm = (
            RMSNorm(norm_width, config.rms_norm_eps) if qk_norm else nn.Identity() for norm_width in norm_widths
        )

    @classmethod
    def layer_type_of(cls, spec: dict[str, Any]) -> str:
        return "sliding_attention" if spec.get("sliding", False) else "full_attention"

    @classmethod
    def plan(cls, name: str, *, qk_norm: bool | str, **options: Any) -> dict[str, str]:
        if name == "tp_plan" and qk_norm == "full":  # the norm needs all heads
            return {**{f"{letter}_proj": "colwise_gather_output" for letter in "qkv"}, "o_proj": "rowwise_split_input"}
        return super().plan(name, **options)

    @classmethod
    def check(
        cls,
        config: Any,
        *,
        qk_norm: bool | str,
        sliding: bool,
        rotary: bool,
        partial_rotary_factor: float,
        rope_parameters: dict[str, Any] | None,
        logit_softcapping: float | None,
        **options: Any,
    ) -> None:
        rotary_width(config.head_dim, partial_rotary_factor)
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={qk_norm!r} is unknown; choose from {QK_NORMS}.")
        if logit_softcapping is not None and logit_softcapping <= 0:
            raise ValueError(f"logit_softcapping={logit_softcapping} must be positive, or None for no cap.")
        if rope_parameters is not None and not rotary:
            raise ValueError("rope_parameters have no effect with rotary=False; drop one of them.")
        if rope_parameters is not None:
            check_rope_parameters(rope_parameters)
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
        output, weights = attend(self, query, key, value, attention_mask, softcap=self.softcap, **kwargs)
        return self.o_proj(output.flatten(2).contiguous()), weights, None

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> queries (B, H, T, d), keys and values (B, H / groups, T, d), rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.norm_heads_apart:
            query, key = query.view(shape), key.view(shape)
        query, key = (x.view(shape).transpose(1, 2) for x in (self.q_norm(query), self.k_norm(key)))
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        if self.rotary:
            query, key = rotate(query, key, *position_embeddings)
        return query, key, value
