"""Statistical top-k (Spark Transformer, https://arxiv.org/abs/2506.06644): a threshold from two moments, no sorting.

    theta = mean(s) + std(s) Phi^-1(1 - k / n)

About k of n scores pass if they are Gaussian; Phi is the normal distribution's cumulative function, std the population
standard deviation. Moments are taken in fp32. The feed-forward subtracts the threshold, relu(s - theta); attention
only compares with it.
"""

import torch


def statistical_threshold(scores: torch.Tensor, top_k: int, visible: torch.Tensor | None = None) -> torch.Tensor:
    """
    Args:
        scores: (..., n).
        top_k: how many of them should pass, on average.
        visible: boolean, broadcastable to `scores`: which of them count; None for all.

    Returns:
        (..., 1) fp32 threshold theta; -inf where no more than `top_k` scores count, so that all of them pass.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if visible is None:
        visible = torch.ones_like(scores[..., :1], dtype=torch.bool).expand_as(scores)
    number = visible.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    mean = scores.where(visible, 0).sum(-1, keepdim=True) / number
    variance = (scores - mean).where(visible, 0).square().sum(-1, keepdim=True) / number
    # the root has no slope at zero: equal scores must not make a gradient of NaN
    deviation = variance.clamp(min=torch.finfo(scores.dtype).tiny).sqrt()
    is_long = number > top_k
    quantile = -torch.special.ndtri((top_k / number).where(is_long, 0.5))  # Phi^-1(1 - p) = -Phi^-1(p)
    return (mean + deviation * quantile).where(is_long, -torch.inf)


def statistical_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The soft form, `relu(s - theta)` over the last axis (..., n): what a Spark feed-forward puts before its GELU.

    Raises:
        ValueError: not 0 < top_k < n.
    """
    if not 0 < top_k < scores.shape[-1]:
        raise ValueError(
            f"top_k={top_k} of {scores.shape[-1]} scores: statistical top-k needs 0 < top_k < their number."
        )
    return torch.relu(scores - statistical_threshold(scores, top_k)).to(scores.dtype)


def passes_statistical_top_k(scores: torch.Tensor, top_k: int, visible: torch.Tensor) -> torch.Tensor:
    """The hard form: which visible scores (..., n) reach theta. A row's largest one always does, so none is empty.

    No gradient runs through the threshold: it only decides.
    """
    with torch.no_grad():
        largest = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)
        threshold = statistical_threshold(scores, top_k, visible).minimum(largest)
        return (scores >= threshold) & visible
