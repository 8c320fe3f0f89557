"""BAM's soft mixture of attention experts (https://arxiv.org/abs/2408.08274, §3.2).

    g = softmax(W_router h),    y = sum_e g_e Wo_e Attention(Wq_e h, Wk_e h, Wv_e h)

Every expert attends for every token. Experts are folded into the head axis: one attention call over E H heads.
Letters: B batch, T time, E attention experts, H query heads and M key-value heads of one expert, d head width.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm, apply_rotary_pos_emb, attend
from ..routers import Soft
from .base import Mixer, MixerOutput


class SoftMixtureOfAttention(Mixer):
    """All attention experts on all tokens, mixed after the output projection by a softmax gate.

    Args:
        num_experts: attention experts E.
        share_key_value: one set of keys and values for all experts (a cache of 2 M d instead of 2 E M d per token).
        qk_norm: RMSNorm per expert over each head's query and key (Qwen3 sources).
        qkv_bias: biases on the query, key and value projections (Qwen2 sources).
        sliding: attend to the last `config.sliding_window` tokens only.
    """

    # heads are expert-major: sharding them would need the gate sharded along with them
    tp_plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_experts: int,
        share_key_value: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        sliding: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_experts, self.share_key_value = num_experts, share_key_value
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        key_experts = 1 if share_key_value else num_experts
        self.num_key_value_groups = num_experts * self.num_heads // (key_experts * self.num_key_value_heads)
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if sliding else None
        width, key_width = num_experts * self.num_heads, key_experts * self.num_key_value_heads
        self.gate = Soft(config, layer_idx, num_experts)
        self.q_proj = nn.Linear(config.hidden_size, width * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(width * self.head_dim, config.hidden_size, bias=False)
        key_shape = (self.head_dim,) if share_key_value else (num_experts, 1, self.head_dim)
        self.q_norm = RMSNorm((num_experts, 1, self.head_dim), config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(key_shape, config.rms_norm_eps) if qk_norm else nn.Identity()

    @classmethod
    def layer_type_of(cls, spec: dict[str, Any]) -> str:
        return "sliding_attention" if spec.get("sliding", False) else "full_attention"

    @classmethod
    def check(cls, config: Any, *, num_experts: int, sliding: bool, **options: Any) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: a mixture of attention needs at least one expert.")
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
        batch, time, _ = hidden_states.shape
        experts = (batch, time, self.num_experts, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(experts))  # (B, T, E, H, d)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        key_experts = (batch, time, -1, self.num_key_value_heads, self.head_dim)  # -1: E, or 1 if they are shared
        key, value = self.k_norm(key.view(key_experts)), value.view(key_experts)
        query, key, value = self.fold(query), key.flatten(2, 3).transpose(1, 2), value.flatten(2, 3).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        gates = self.gate(hidden_states.flatten(0, 1)).weights.view(batch, time, self.num_experts, 1, 1)
        return self.o_proj((self.unfold(output) * gates).flatten(2)), weights, None

    def fold(self, query: torch.Tensor) -> torch.Tensor:
        """(B, T, E, H, d) -> (B, E H, T, d), with the query heads that read one key head next to each other."""
        if self.share_key_value:  # key head m serves group m of every expert: (M, E, H / M)
            query = query.unflatten(3, (self.num_key_value_heads, -1)).transpose(2, 3).flatten(2, 3)
        return query.flatten(2, 3).transpose(1, 2)

    def unfold(self, output: torch.Tensor) -> torch.Tensor:
        """(B, T, E H, d), heads in the order of `fold`, -> (B, T, E, H, d)."""
        if not self.share_key_value:
            return output.unflatten(2, (self.num_experts, self.num_heads))
        output = output.unflatten(2, (self.num_key_value_heads, self.num_experts, -1))
        return output.transpose(2, 3).flatten(3, 4)
