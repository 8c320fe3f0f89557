"""Runs experts for the slots in use only.

A router may choose a different number of experts for each token: an unused slot has weight 0. It may also choose
experts that compute nothing: their indices come after the others. Neither reaches a matrix product.
Letters: N tokens, D width, E experts, K slots per token.
"""

from typing import Any

import torch
from torch.compiler import is_compiling


def run_used_slots(
    experts: Any, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """`experts(tokens, indices, weights)` (N, D), without the slots whose weight is 0 or whose index is E or more.

    Shapes depend on the routing, so a GPU waits once for their number. A compiled graph cannot: there, idle slots run
    as expert 0 with weight 0, as they do in experts that are `joint`.

    Args:
        experts: what `Experts` promises.
        tokens: (N, D).
        indices: (N, K).
        weights: (N, K).
        num_experts: E.
    """
    used = (weights != 0) & (indices < num_experts)
    if is_compiling() or are_joint(experts):
        return experts(tokens, indices.where(used, 0), weights.where(used, 0))
    token, slot = used.nonzero(as_tuple=True)
    if token.numel() == 0:  # one idle row: every expert keeps a gradient, of zero
        return tokens.new_zeros(tokens.shape).index_add(
            0, indices.new_zeros(1), experts(tokens[:1], indices.new_zeros(1, 1), weights.new_zeros(1, 1))
        )
    indices, weights = indices[token, slot, None], weights[token, slot, None]
    # quantisation puts a module of its own in the experts' place, expert parallelism a forward of its own
    if getattr(experts, "takes_rows", False) and not getattr(experts, "_is_expert_parallel", False):
        return experts(tokens, indices, weights, token)
    rows = experts(tokens.index_select(0, token), indices, weights)
    return tokens.new_zeros(tokens.shape).index_add(0, token, rows)


def are_joint(experts: Any) -> bool:
    """Whether the experts of one token must run together; an adapter around them (PEFT's) does not know it."""
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return getattr(experts, "joint", False)
