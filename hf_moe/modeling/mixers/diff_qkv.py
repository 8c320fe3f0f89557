"""DiffQKV: queries, keys and values in numbers and widths of their own (Sigma, https://arxiv.org/abs/2501.13629, §3).

    q = W_down (act(W_gate q') * W_up q'),  q' = W_q x            augmented queries, all heads together (appendix E)
    y = W_o [sum_s softmax_s(q_i k_s,m(i) / sqrt(d_k)) v_s,j(i)],  m(i) = floor(i M / H),  j(i) = floor(i J / H)

The cache holds M d_k + J d_v numbers per token. The paper's ablation that caches narrow keys and lifts them by a
feed-forward to the width of the queries is not here: it is in no released model, and the paper does not say whether
positions come before or after the lift. `key_head_dim` makes queries and keys narrow alike.
Letters: B batch, T time, S keys in the cache, H query heads, M key heads, J value heads, d_k, d_v their widths.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ..cache import MaskedLayer
from ..context import NO_CONTEXT, ForwardContext
from ..layers import attend, rotary_embedding, rotate
from ..ops.grouped_query import grouped_scores, grouped_sums
from .base import Mixer, MixerOutput


class DiffQkv(Mixer):
    """Softmax attention with fewer key heads than value heads, of which the config counts `num_key_value_heads`.

    Args:
        num_key_heads: key heads M.
        key_head_dim: entries d_k of a query and key head; None takes `config.head_dim`, which values always have.
        query_size: width of the queries' feed-forward, over all heads; None leaves them as projected.
        top_values: in evaluation, sum only the values of this many best keys of each query; None sums all.
        renormalize: their weights sum to one; the paper does not say. False keeps them as they are among all keys.
    """

    tp_plan = dict.fromkeys([f"{name}_proj" for name in ("q", "q_gate", "q_up", "q_down", "k", "v", "o")], "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_key_heads: int,
        key_head_dim: int | None = None,
        query_size: int | None = None,
        top_values: int | None = None,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.sliding_window = config, layer_idx, True, None
        self.key_head_dim, self.value_head_dim = key_head_dim or config.head_dim, config.head_dim
        self.scaling, self.attention_dropout = self.key_head_dim**-0.5, config.attention_dropout
        self.num_heads, self.num_key_heads = config.num_attention_heads, num_key_heads
        self.num_value_heads, self.top_values, self.renormalize = config.num_key_value_heads, top_values, renormalize
        self.shared_heads = math.lcm(num_key_heads, self.num_value_heads)  # as many as the kernels see of both
        self.num_key_value_groups = self.num_heads // self.shared_heads
        width, query_width = config.hidden_size, self.num_heads * self.key_head_dim
        self.rotary_emb = rotary_embedding(config, self.key_head_dim)
        self.act_fn = ACT2FN[config.hidden_act]
        self.q_proj, self.q_gate_proj = nn.Linear(width, query_width, bias=False), None
        if query_size is not None:
            self.q_gate_proj = nn.Linear(query_width, query_size, bias=False)
            self.q_up_proj = nn.Linear(query_width, query_size, bias=False)
            self.q_down_proj = nn.Linear(query_size, query_width, bias=False)
        self.k_proj = nn.Linear(width, num_key_heads * self.key_head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_value_heads * self.value_head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_head_dim, width, bias=False)

    @classmethod
    def layer_type_of(cls, spec: dict[str, Any]) -> str:
        masked: Any = MaskedLayer._layer_type  # by reference, so that a flat file keeps the class
        return "full_attention" if spec.get("top_values") is None else masked

    @classmethod
    def check(cls, config: Any, *, num_key_heads: int, key_head_dim: int | None, **options: Any) -> None:
        divisors = [n for n in range(1, config.num_attention_heads + 1) if config.num_attention_heads % n == 0]
        if num_key_heads not in divisors:
            raise ValueError(
                f"num_key_heads={num_key_heads} does not divide num_attention_heads={config.num_attention_heads}; "
                f"use one of {divisors}."
            )
        if key_head_dim is not None and (key_head_dim < 2 or key_head_dim % 2):
            raise ValueError(f"key_head_dim={key_head_dim}: rotary positions need an even number of entries.")
        for name in ("query_size", "top_values"):
            if options[name] is not None and options[name] < 1:
                raise ValueError(f"{name}={options[name]} must be at least 1; None turns it off.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        query = self.q_proj(hidden_states)
        if self.q_gate_proj is not None:
            query = self.q_down_proj(self.act_fn(self.q_gate_proj(query)) * self.q_up_proj(query))
        query, key = (to_heads(x, self.key_head_dim) for x in (query, self.k_proj(hidden_states)))
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        query, key = rotate(query, key, *position_embeddings)  # (B, H, T, d_k), (B, M, T, d_k)
        value = self.v_proj(hidden_states)
        if past_key_values is not None:  # as one wide head: some caches allow one number of heads only
            key = key.transpose(1, 2).flatten(2)
            wide = past_key_values.update(key.unsqueeze(1), value.unsqueeze(1), self.layer_idx)
            key, value = to_heads(wide[0].squeeze(1), self.key_head_dim), wide[1].squeeze(1)
        value = to_heads(value, self.value_head_dim)  # (B, J, S, d_v)
        if self.top_values is None:
            key = key.repeat_interleave(self.shared_heads // self.num_key_heads, 1)
            value = value.repeat_interleave(self.shared_heads // self.num_value_heads, 1)
            output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        else:
            assert attention_mask is not None, "masks of this layer type are always explicit"
            weights = self.select(grouped_scores(query, key) * self.scaling, attention_mask, self.top_values)
            weights = weights.to(value.dtype)
            output = grouped_sums(weights, value).transpose(1, 2)
        return self.o_proj(output.flatten(2)), weights, None

    def select(self, scores: torch.Tensor, attention_mask: torch.Tensor, count: int) -> torch.Tensor:
        """Weights (B, H, T, S) of the values: in evaluation, zero for all but the `count` best keys of each query."""
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~attention_mask, lowest)
        if self.training or count >= scores.shape[-1]:
            return nn.functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        best = scores.topk(count, -1).indices
        others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, best, False)
        if self.renormalize:
            return scores.masked_fill(others, lowest).softmax(-1)
        return scores.softmax(-1).masked_fill(others, 0.0)


def to_heads(rows: torch.Tensor, width: int) -> torch.Tensor:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return rows.unflatten(-1, (-1, width)).transpose(1, 2)
