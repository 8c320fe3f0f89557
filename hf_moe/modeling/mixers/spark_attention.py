"""Spark Transformer's attention (https://arxiv.org/abs/2506.06644): a part of each head predicts which keys matter.

    s1 = q[:r] . k[:r],    s2 = q[r:] . k[r:],    o = sum_j softmax_j(s1 if s1 >= theta else -inf) softplus(s2_j) v_j

theta is the statistical top-k threshold of the query's row of s1. No code is released. What the paper leaves open, and
the reading taken here:

* Statistics: over the keys that the query may see, so that the result does not depend on padding, packing or chunks.
* Rows with no more than k visible keys keep them all; the largest s1 of a row is kept even below theta.
* theta has no gradient, it only decides; s1 learns through the softmax.
* Scale: `scale`. It never changes which keys are kept.
* Rotation: `rotary`. Rotating whole heads and then cutting them would tear apart the pairs (i, i + d/2) whose rotation
  makes scores relative; therefore pairs never straddle the cut.

The threshold needs all s1, and in plain torch s2 is computed for all keys as well: it is the published function, not
the published speed. The cache is that of grouped-query attention.
Letters: B batch, T queries, S keys, H query heads, d head width, r its predicting part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ..cache import MaskedLayer
from ..context import NO_CONTEXT, ForwardContext
from ..layers import apply_rotary_pos_emb
from ..ops.grouped_query import grouped_scores, grouped_sums
from ..ops.statistical_top_k import passes_statistical_top_k
from .base import Mixer, MixerOutput

SCALES, ROTATIONS = ("head", "parts", "none"), ("parts", "head", "predictor", "none")


class SparkAttention(Mixer):
    """Attention to about `top_k` keys per query, chosen by the first `predictor_size` entries of each head.

    Args:
        top_k: k, how many keys a query should attend to (the paper's 256).
        predictor_size: r; half the head if None, as in the paper (128 of 256).
        scale: "head" multiplies s1 and s2 by d^-1/2, as scaling the query before the cut does (Gemma-2, from which
            the paper starts); "parts" by r^-1/2 and (d - r)^-1/2; "none" by 1, as the paper's formula reads.
        rotary: "parts" rotates both parts like heads of their own width; "head" deals out the frequencies of a whole
            head, the high ones to the predictor; "predictor" rotates the predictor only; "none" is NoPE.
    """

    tp_plan = {**{f"{name}_proj": "colwise" for name in "qkv"}, "o_proj": "rowwise"}
    layer_type = str(MaskedLayer._layer_type)  # by reference, so that a flat file keeps the class

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        top_k: int = 256,
        predictor_size: int | None = None,
        scale: str = "head",
        rotary: str = "parts",
    ) -> None:
        super().__init__()
        self.layer_idx, self.top_k, self.head_dim = layer_idx, top_k, config.head_dim
        self.attention_dropout = config.attention_dropout
        self.sizes = part_sizes(config, predictor_size)
        widths = {"head": (self.head_dim, self.head_dim), "parts": self.sizes, "none": (1, 1)}[scale]
        self.scales = [width**-0.5 for width in widths]
        evenly = [[i * self.head_dim // size for i in range(size // 2)] for size in self.sizes]
        cut = self.sizes[0] // 2
        in_order = [list(range(cut)), list(range(cut, self.head_dim // 2))]
        # of each rotated part, which of the head's d/2 frequencies its pairs turn with
        self.frequencies = {"parts": evenly, "head": in_order, "predictor": evenly[:1], "none": []}[rotary]
        width, key_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    @classmethod
    def check(
        cls, config: Any, *, top_k: int, predictor_size: int | None, scale: str, rotary: str, **options: Any
    ) -> None:
        rank, rest = part_sizes(config, predictor_size)
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: a query attends to at least one key.")
        if rank < 1 or rest < 1:
            raise ValueError(f"predictor_size={rank} must be between 1 and head_dim - 1 = {config.head_dim - 1}.")
        if scale not in SCALES or rotary not in ROTATIONS:
            raise ValueError(f"scale={scale!r} must be one of {SCALES}, rotary={rotary!r} one of {ROTATIONS}.")
        if (rank % 2 and rotary != "none") or (rest % 2 and rotary in ("parts", "head")):
            raise ValueError(f"rotary={rotary!r} needs parts of even size; a head is cut into {rank} and {rest}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        assert attention_mask is not None, "masks of this layer type are always explicit"
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotate_parts(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        parts = zip(query.split(self.sizes, -1), key.split(self.sizes, -1), self.scales)
        predicted, strength = (grouped_scores(q, k) * scale for q, k, scale in parts)  # (B, H, T, S)
        kept = passes_statistical_top_k(predicted, self.top_k, attention_mask)
        chosen = predicted.masked_fill(~kept, torch.finfo(predicted.dtype).min).softmax(-1)
        weights = (chosen * F.softplus(strength) * kept).to(value.dtype)  # kept: a padded query sees nothing
        weights = F.dropout(weights, self.attention_dropout, self.training)
        output = grouped_sums(weights, value).transpose(1, 2)
        return self.o_proj(output.flatten(2)), weights, None

    def rotate_parts(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate each part of the heads within itself."""
        parts = list(zip(query.split(self.sizes, -1), key.split(self.sizes, -1)))
        for i, chosen in enumerate(self.frequencies):
            parts[i] = apply_rotary_pos_emb(*parts[i], cos[..., chosen + chosen], sin[..., chosen + chosen])
        return torch.cat([q for q, _ in parts], -1), torch.cat([k for _, k in parts], -1)


def part_sizes(config: Any, predictor_size: int | None) -> tuple[int, int]:
    """How a head is cut: r and d - r."""
    rank = config.head_dim // 2 if predictor_size is None else predictor_size
    return rank, config.head_dim - rank
