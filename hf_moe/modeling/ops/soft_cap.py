"""Soft caps, `c tanh(x / c)`, on logits and on attention scores (Gemma 2, https://arxiv.org/abs/2408.00118, sec. 2).

Letters: B batch, H query heads, M key heads, T queries, S keys, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .grouped_query import grouped_scores, grouped_sums


def soft_cap(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`cap * tanh(values / cap)`, which is nearly the identity far below the cap; None caps nothing."""
    return values if cap is None else torch.tanh(values / cap) * cap


def soft_capped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with capped scores in plain torch, where the kernels called `eager` and `sdpa` know no cap.

    Args:
        query: (B, H, T, d); key and value: (B, M, S, d).
        attention_mask: (B or 1, 1, T, S), which Transformers made for either kernel: what is added to the scores, or
            True for what may be seen. None as for `sdpa`: one query sees all keys, several see those up to their own
            number (the first T keys of an empty static cache).

    Returns:
        Output (B, T, H, d) and the attention weights (B, H, T, S).
    """
    scores = soft_cap(grouped_scores(query, key) * scaling, softcap)
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1).to(query.dtype), dropout, module.training)
    return grouped_sums(weights, value).transpose(1, 2).contiguous(), weights
