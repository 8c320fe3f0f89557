"""Mixture of attention heads: each token chooses the attention experts that query for it, all read one set of keys.

MoA (https://arxiv.org/abs/2210.05144) has experts of one head, JetMoE (https://arxiv.org/abs/2404.07413) of a group
of heads. For the experts e in top_k(W_gate x_t), with weights w, and each of an expert's heads h:

    q_teh = Wq_eh x_t,    a_teh = sum_s softmax_s(q_teh k_sh / sqrt(d)) v_sh,    y_t = sum_e w_te sum_h Wo_eh a_teh

Keys and values belong to nobody, so tokens with different experts can look at each other, and the cache holds 2 H d
numbers per token whatever E and K are.
Letters: B batch, T time, N = B T tokens, D width, E experts, K chosen per token, H heads of one expert, d head width.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import apply_rotary_pos_emb, attend
from ..ops.grouped import GroupedRows
from ..parts import Slot, build
from ..routers import ROUTERS
from .base import Mixer, MixerOutput

RELEASED_ROUTER = {"type": "top_k", "top_k": 2, "normalize": False}  # how MoA's released code weighs its experts


class MixtureOfAttention(Mixer):
    """Routed query and output projections over one set of keys and values. Counts its heads itself: `config` says only
    how wide a head is.

    Args:
        num_experts: attention experts E.
        heads_per_expert: query heads H of one expert, and key-value heads of all: 1 in MoA, 16 in JetMoE-8B.
        router: spec of a part in `ROUTERS` without a state. Probabilities of the chosen experts as they are (the
            default, MoA's released code), divided by their sum (`normalize`: MoA's paper, which sends no gradient
            through the sum, while ours does), or the softmax of the chosen logits (`softmax_selected`: JetMoE).
        output_bias: a bias on the summed output (JetMoE), zero at the start.
        rotary: rotate queries and keys by position; False is NoPE.
    """

    slots = {"router": Slot("gate", ROUTERS)}
    # the heads of a token are of different experts: there is nothing to shard by
    tp_plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_experts: int,
        heads_per_expert: int = 1,
        router: dict[str, Any] = RELEASED_ROUTER,
        output_bias: bool = False,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.rotary = config, layer_idx, True, rotary
        self.num_experts, self.num_heads = num_experts, heads_per_expert
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.attention_dropout, self.sliding_window = config.attention_dropout, None
        self.gate = build(ROUTERS, router, config, layer_idx, num_experts)
        self.num_key_value_groups = self.gate.top_k
        width = heads_per_expert * config.head_dim
        self.q_proj = nn.Parameter(torch.empty(num_experts, width, config.hidden_size))
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, width))
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if output_bias else None

    @classmethod
    def check(cls, config: Any, *, num_experts: int, heads_per_expert: int, router: dict, **options: Any) -> None:
        if ROUTERS[router["type"]].carries_state or ROUTERS[router["type"]].reads_experts:
            raise ValueError(
                f"A {router['type']!r} router carries its state through the feed-forwards or reads their experts; use "
                "another one, e.g. 'top_k', for 'mixture_of_attention'."
            )
        if heads_per_expert < 1:
            raise ValueError(f"heads_per_expert={heads_per_expert} must be at least 1.")
        ROUTERS[router["type"]].check_number(num_experts, router)

    def init_weights(self, std: float) -> None:
        init.normal_(self.q_proj, std=std)
        init.normal_(self.o_proj, std=std)
        if self.o_bias is not None:
            init.zeros_(self.o_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        shape = (*hidden_states.shape[:2], -1, self.num_heads, self.head_dim)  # -1: slots, or nothing to choose from
        tokens = hidden_states.flatten(0, 1)  # (N, D)
        routing = self.gate(tokens, None, context)
        assert routing.state is None, "`check` lets no router with a state in"
        rows = GroupedRows(routing.indices, self.num_experts, self.config._experts_implementation)
        query = rows.linear(tokens.index_select(0, rows.token), self.q_proj)  # (N K, H d), sorted by expert
        query = torch.empty_like(query).index_copy(0, rows.permutation, query).view(shape)
        key = self.k_proj(hidden_states).view(shape).squeeze(2).transpose(1, 2)  # (B, H, T, d)
        value = self.v_proj(hidden_states).view(shape).squeeze(2).transpose(1, 2)
        # the K queries that read one key head next to each other: keys and values need no copy
        self.num_key_value_groups = query.shape[2]  # a router's k may change, as SMoE-Dropout's does
        query = query.permute(0, 3, 2, 1, 4).flatten(1, 2).to(key.dtype)  # (B, H K, T, d)
        if self.rotary:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        output = output.unflatten(2, (self.num_heads, -1)).transpose(2, 3).reshape(len(rows.token), -1)  # (N K, H d)
        output = output.index_select(0, rows.permutation) * rows.order(routing.weights)[:, None]
        output = rows.sum(rows.linear(output, self.o_proj)).to(tokens.dtype).view_as(hidden_states)
        if self.o_bias is not None:
            output = output + self.o_bias
        return output, weights, self.gate.wanted_losses(routing, context)
