"""What counts of chosen experts say; every figure by its formula, in float64.

Letters: E experts to choose from, those without parameters included; M domains; c_e how often expert e was chosen.
"""

import math

import torch


def shares(counts: torch.Tensor) -> torch.Tensor:
    """(..., E) `c_e / sum(c)` of counts (..., E); all 0 where nothing was chosen."""
    counts = counts.double()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def entropy(distributions: torch.Tensor) -> torch.Tensor:
    """(...) `-sum p log p` in nats of distributions (..., E)."""
    return -torch.xlogy(distributions, distributions).sum(-1)


def normalized_entropy(distributions: torch.Tensor) -> torch.Tensor:
    """(...) entropy divided by its largest value, log E: 1 is even, 0 is one expert only (and where E is 1)."""
    return entropy(distributions) / max(math.log(distributions.shape[-1]), 1e-9)


def coactivation(pairs: torch.Tensor) -> torch.Tensor:
    """(E, E) `P(j | i) = n_ij / n_i`, as OLMoE reports it (https://arxiv.org/abs/2409.02060).

    Args:
        pairs: (E, E) n_ij tokens that chose both i and j, n_i on the diagonal.

    Returns:
        Row i: of the tokens that chose i, the share that chose j too; 0 on the diagonal, and in the row of an expert
        that was never chosen. With K of E experts per token, chosen independently, it would be (K - 1) / (E - 1).
    """
    pairs = pairs.double()
    conditional = pairs / pairs.diagonal()[:, None].clamp(min=1)
    return conditional.fill_diagonal_(0)


def jensen_shannon_of_all(distributions: torch.Tensor) -> float:
    """`(H(mean_d p_d) - mean_d H(p_d)) / log M` of M distributions (M, E) with equal weights (Lin, 1991, eq. 5.1).

    Returns:
        0: every domain uses the experts alike; 1: no two domains use the same expert. 0 if there is one domain.
    """
    if len(distributions) < 2:
        return 0.0
    gap = entropy(distributions.mean(0)) - entropy(distributions).mean()
    return max(gap.item(), 0.0) / math.log(len(distributions))


def specialization(distributions: torch.Tensor) -> torch.Tensor:
    """(M, E) `p_d(e) / mean_d' p_d'(e)`: 1 if a domain uses the expert as much as the others do on average, M if no
    other domain uses it, 0 if it does not use it (and where none does)."""
    mean = distributions.mean(0)
    return torch.where(mean > 0, distributions / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0)
