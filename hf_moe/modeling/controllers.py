"""Controllers of the selection bias: how far each expert's bias moves after an optimizer step, from its load.

Balancing without a loss (https://arxiv.org/abs/2408.15664): an expert is chosen by `score + bias` and weighted by its
score. Letters: E experts (those that compute nothing included), R of them true, K chosen per token, n the step.

A controller takes `loads (E,)`, the `rate` u and keywords, and returns (E,) what to add to the bias. Errors are shares
of all assignments, so that no rate depends on the size of the batch.
"""

from collections.abc import Callable
from typing import Any

import torch


def share_errors(loads: torch.Tensor, targets: torch.Tensor | float) -> torch.Tensor:
    """(E,) target share less actual share: positive for an expert that got too little; 0 if there was no token."""
    total = loads.sum()
    return (targets * total - loads) / total.clamp(min=1)


def sign(loads: torch.Tensor, rate: float, **others: Any) -> torch.Tensor:
    """`u sign(mean(c) - c_e)`: the paper's update (algorithm 1) and DeepSeek-V3's, both with u = 0.001."""
    return rate * (loads.mean() - loads).sign()


def sign_zero_mean(loads: torch.Tensor, rate: float, **others: Any) -> torch.Tensor:
    """`u (sign(d) - mean(sign(d)))`, `d = mean(c) - c`: Ling 2.0's update (https://arxiv.org/abs/2510.22115), which
    cannot let the biases drift together. Its u goes from 0.001 to 0.0001."""
    signs = (loads.mean() - loads).sign()
    return rate * (signs - signs.mean())


def proportional(loads: torch.Tensor, rate: float, **others: Any) -> torch.Tensor:
    """`u (1 / E - c_e / sum(c))`: the paper's variant, which softmax scores need; there the error is in tokens.

    It is a step of constant size on the dual of assigning tokens evenly (https://arxiv.org/abs/2512.03915).
    """
    return rate * share_errors(loads, 1 / loads.numel())


def inverse_sqrt(loads: torch.Tensor, rate: float, *, step: int, **others: Any) -> torch.Tensor:
    """`proportional` with the rate `u / sqrt(n)`, n = 1 for the first step (https://arxiv.org/abs/2512.03915; the
    family is from that paper, the error in shares is ours)."""
    return proportional(loads, rate / step**0.5)


def inverse(loads: torch.Tensor, rate: float, *, step: int, **others: Any) -> torch.Tensor:
    """`proportional` with the rate `u / n`, n = 1 for the first step (as `inverse_sqrt`)."""
    return proportional(loads, rate / step)


def true_experts(
    loads: torch.Tensor, rate: float, *, num_zero_experts: int, true_share: float, **others: Any
) -> torch.Tensor:
    """LongCat-Flash's controller (https://arxiv.org/abs/2509.01322, §2.1): `u (K_e / (K R) - c_e / sum(c))` for a true
    expert, 0 for one that computes nothing.

    The biases of true experts rise until a token uses `K_e` of them on average, and are even by then. The paper gives
    no value for u.

    Args:
        num_zero_experts: E - R, the last experts.
        true_share: `K_e / K`; LongCat-Flash wants 8 true experts among 12.
    """
    num_true = loads.numel() - num_zero_experts
    error = share_errors(loads, true_share / num_true)
    return rate * error.where(torch.arange(loads.numel(), device=loads.device) < num_true, 0)


CONTROLLERS: dict[str, Callable[..., torch.Tensor]] = {
    "sign": sign,
    "sign_zero_mean": sign_zero_mean,
    "proportional": proportional,
    "inverse_sqrt": inverse_sqrt,
    "inverse": inverse,
    "true_experts": true_experts,
}


def max_violation(loads: torch.Tensor) -> torch.Tensor:
    """`MaxVio = max(c) / mean(c) - 1` (https://arxiv.org/abs/2408.15664, §4.1): 0 at perfect balance, E - 1 at
    collapse onto one expert, 0 if there was no token."""
    return (loads.max() - loads.mean()) / loads.mean().clamp(min=torch.finfo(loads.dtype).tiny)
