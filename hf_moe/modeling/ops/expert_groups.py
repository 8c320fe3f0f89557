"""Balance between groups of consecutive experts, and inside them. Letters: N tokens, E experts, K chosen, G groups."""

import torch

from ..losses import assignments, load_shares, real_tokens, shares


def between_groups_loss(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    num_groups: int,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """DeepSeekMoE's device-level loss `G sum_g f_g P_g` (https://arxiv.org/abs/2401.06066, eq. 15-17).

    `f_g` is the share of all assignments that went to group g, `P_g` the mean of its experts' share of a token's
    scores. 1 if the groups are used equally, whatever happens inside them; G if one group gets everything.

    Args:
        scores: (N, E); gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
    """
    real = real_tokens(scores, token_mask)
    loads = (assignments(scores, indices, weights) * real).sum(0).unflatten(0, (num_groups, -1)).sum(-1)  # (G,)
    means = (shares(scores) * real).sum(0).unflatten(0, (num_groups, -1)).sum(-1) / real.sum().clamp(min=1)
    return num_groups * (load_shares(loads) * means).sum()


def within_groups_loss(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    num_groups: int,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean over the groups of Switch's loss of each group by itself: `(E/G) sum_e f_e P_e` of its E/G experts.

    Shares are those of a group's assignments, and of a token's scores inside the group, so that the probability of
    the group as a whole does not matter. 1 at perfect balance, E/G if one expert of each group gets everything.

    Args:
        scores: (N, E); gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
    """
    real = real_tokens(scores, token_mask)
    loads = (assignments(scores, indices, weights) * real).sum(0).unflatten(0, (num_groups, -1))  # (G, E / G)
    inside = shares(scores.unflatten(-1, (num_groups, -1)))  # (N, G, E / G)
    means = (inside * real[..., None]).sum(0) / real.sum().clamp(min=1)
    return loads.shape[-1] * (load_shares(loads) * means).sum(-1).mean()
