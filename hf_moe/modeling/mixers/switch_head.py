"""SwitchHead: few attention heads, each with experts for its values and its outputs (https://arxiv.org/abs/2312.07987).

Head h has one query and one key projection, E value experts and E output experts. With S_V = top_k(sigmoid(W_sv,h x))
of the token that is looked at, and S_O = top_k(sigmoid(W_so,h x)) of the token that looks:

    v_th = sum_{e in S_V(t)} s_V,the Wv_he x_t,    a_th = sum_s softmax_s(q_th k_sh / sqrt(d)) v_sh,
    y_t  = sum_h sum_{e in S_O(t)} s_O,the Wo_he a_th

The chosen sigmoids are not divided by their sum and nothing is balanced. The cache holds keys and mixed values, 2 H d
numbers per token. The released code scales q and k by d^(-1/4) each, which is the same product.
Letters: B batch, T time, N = B T tokens, D width, H heads, E experts of one head, K chosen of them, d head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import attend, rotary_embedding, rotary_width, rotate
from ..ops.grouped import GroupedRows
from ..parts import Part
from .base import Mixer, MixerOutput


class HeadRouter(Part):
    """Chooses K experts of each head by a sigmoid: `forward(tokens (N, D)) -> (indices, weights)`, both (N, H, K)."""

    def __init__(self, width: int, heads: int, experts: int, top_k: int, dropout: float, scale: float | None) -> None:
        super().__init__()
        self.shape, self.top_k, self.dropout, self.init_scale = (heads, experts), top_k, dropout, scale
        self.weight = nn.Parameter(torch.empty(heads * experts, width))

    def init_weights(self, std: float) -> None:
        """Rows of equal norm, which is that of normal ones."""
        norm = std * math.sqrt(self.weight.shape[1]) if self.init_scale is None else self.init_scale
        init.copy_(self.weight, norm * F.normalize(torch.randn_like(self.weight), dim=-1))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, experts = self.shape
        scores = F.linear(tokens, self.weight).float().sigmoid().view(-1, heads, experts)
        selection = scores.detach()
        if self.training and self.dropout:
            selection = selection.masked_fill(torch.rand_like(selection) < self.dropout, -1)
        indices = selection.topk(self.top_k, dim=-1).indices
        first = torch.arange(0, heads * experts, experts, device=indices.device)  # of the experts of all heads
        return indices + first[:, None], scores.gather(-1, indices).to(tokens.dtype)


class SwitchHead(Mixer):
    """Dense queries and keys, routed values and outputs. Counts its heads itself: `config` says only how wide one is.

    Args:
        num_heads: attention heads H (the paper's 2 to 4, where a dense model has 8 to 16).
        num_experts: value experts, and output experts, of each head.
        top_k: experts per head and token, of either kind.
        rotary: rotate queries and keys by position; False is NoPE.
        partial_rotary_factor: share of each head that is rotated, from its first entry on.
        expert_dropout: probability, in training, that an expert is not to be chosen.
        init_scale: initial weights have standard deviation init_scale / sqrt(inputs), as in the released code, which
            wants 1 / sqrt(layers). None: `config.initializer_range`, as in every other part.
    """

    # the experts of all heads are in one stack: there is nothing to shard by
    tp_plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_heads: int,
        num_experts: int,
        top_k: int = 2,
        rotary: bool = True,
        partial_rotary_factor: float = 0.5,
        expert_dropout: float = 0.0,
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.rotary = config, layer_idx, True, rotary
        self.num_heads, self.num_experts, self.init_scale = num_heads, num_heads * num_experts, init_scale
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups, self.sliding_window, self.attention_dropout = 1, None, config.attention_dropout
        width, head = config.hidden_size, config.head_dim
        self.rotary_emb = rotary_embedding(config, rotary_width(head, partial_rotary_factor)) if rotary else None
        self.q_proj = nn.Linear(width, num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, num_heads * head, bias=False)
        self.v_proj = nn.Parameter(torch.empty(self.num_experts, head, width))
        self.o_proj = nn.Parameter(torch.empty(self.num_experts, width, head))
        gate = (width, num_heads, num_experts, top_k, expert_dropout, init_scale)
        self.v_gate, self.o_gate = HeadRouter(*gate), HeadRouter(*gate)

    @classmethod
    def check(cls, config: Any, *, num_heads: int, num_experts: int, top_k: int, **options: Any) -> None:
        if options["rotary"]:
            rotary_width(config.head_dim, options["partial_rotary_factor"])
        dropout = options["expert_dropout"]
        if num_heads < 1 or not 0 <= dropout < 1:
            raise ValueError(f"num_heads={num_heads} must be at least 1 and expert_dropout={dropout} in [0, 1).")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be 1 to num_experts={num_experts}, the experts of one head.")

    def init_weights(self, std: float) -> None:
        width, heads = self.config.hidden_size, self.num_heads * self.head_dim
        weights = (self.q_proj.weight, width), (self.k_proj.weight, width), (self.v_proj, width), (self.o_proj, heads)
        for weight, inputs in weights:  # the linear children's too, which have started already
            init.normal_(weight, std=std if self.init_scale is None else self.init_scale / math.sqrt(inputs))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        tokens, shape = hidden_states.flatten(0, 1), (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H, T, d)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.mixed_values(tokens).to(key.dtype).view(shape).transpose(1, 2)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        if self.rotary:
            query, key = rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.mixed_outputs(tokens, output.flatten(0, 2)).to(tokens.dtype).view_as(hidden_states), weights, None

    def mixed_values(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N H, d): the values of the chosen experts, added up per head."""
        indices, weights = self.v_gate(tokens)
        rows = GroupedRows(indices.flatten(0, 1), self.num_experts, self.config._experts_implementation)
        values = rows.linear(tokens.index_select(0, rows.token // self.num_heads), self.v_proj)  # (N H K, d)
        return rows.sum(values * rows.order(weights)[:, None])

    def mixed_outputs(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(N, D) and (N H, d) -> (N, D): the outputs of the chosen experts, added up over the heads."""
        indices, weights = self.o_gate(tokens)
        rows = GroupedRows(indices.flatten(1), self.num_experts, self.config._experts_implementation)
        attended = attended.index_select(0, rows.permutation // indices.shape[-1])  # (N H K, d)
        return rows.sum(rows.linear(attended * rows.order(weights)[:, None], self.o_proj))
