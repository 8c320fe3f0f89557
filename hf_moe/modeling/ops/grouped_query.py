"""Scores and sums of grouped-query attention without copying keys or values to every query head.

Letters: B batch, H query heads, M key heads, T queries, S keys, d head width.
"""

import torch


def grouped_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Inner products (B, H, T, S) of queries (B, H, T, d) and keys (B, M, S, d), made fp32 like eager attention's."""
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, M, H / M T, d)
    scores = (folded @ key.mT).view(*query.shape[:3], key.shape[2])
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def grouped_sums(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sums (B, H, T, d) of values (B, M, S, d) under weights (B, H, T, S)."""
    folded = weights.reshape(weights.shape[0], value.shape[1], -1, weights.shape[-1])
    return (folded @ value).view(*weights.shape[:3], value.shape[-1])
