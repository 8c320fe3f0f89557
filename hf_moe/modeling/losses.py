"""Balance losses, computed per router call from the scores and the selection that were really used.

Letters: N tokens, E experts, K chosen experts per token.
"""

from collections.abc import Iterable

import torch


def switch_loss(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch Transformer's load-balancing loss `E sum_e f_e P_e` (https://arxiv.org/abs/2101.03961, eq. 4-6).

    `f_e` is the share of all (token, slot) assignments that went to expert e, `P_e` its mean score: perfect balance
    gives 1, collapse onto one expert with probability 1 gives E.

    Args:
        scores: (N, E) router probabilities; gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 is padding and counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
    """
    assigned = torch.zeros_like(scores).scatter_add_(1, indices, (weights.detach() > 0).to(scores.dtype))  # (N, E)
    real = scores.new_ones(scores.shape[0], 1) if token_mask is None else token_mask[:, None].to(scores.dtype)
    counts = (assigned * real).sum(0)
    mean_scores = (scores * real).sum(0) / real.sum().clamp(min=1)
    return scores.shape[-1] * (counts / counts.sum().clamp(min=1) * mean_scores).sum()


def router_z_loss(logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """ST-MoE's router z-loss `mean_n (logsumexp_e logits_ne)^2` (https://arxiv.org/abs/2202.08906, eq. 5).

    Args:
        logits: (N, E).
        token_mask: (N,) True for real tokens; None if all are.
    """
    squared = logits.float().logsumexp(-1).square()
    if token_mask is None:
        return squared.mean()
    return (squared * token_mask).sum() / token_mask.sum().clamp(min=1)


def share_of_labels(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor | float:
    """This micro-batch's part of the labels in the whole optimizer step (1 when it is the whole step).

    Trainer divides the summed cross-entropy by `num_items_in_batch`, the label tokens of all micro-batches on all
    processes. A balance loss is a mean, so it needs this weight for its coefficient not to grow with their number.
    """
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    return (predicted != -100).sum() / num_items_in_batch


class RouterLogits(tuple):
    """The router logits of all MoE layers, in order, and the balance loss that belongs to them.

    TRL's trainers call the decoder without its language-modeling head and hand these logits to Mixtral's formula,
    which pools layers and guesses the selection; `host.py` makes that function return `aux_loss` instead.
    """

    aux_loss: torch.Tensor | None

    def __new__(cls, logits: Iterable[torch.Tensor], aux_loss: torch.Tensor | None = None) -> "RouterLogits":
        self = super().__new__(cls, logits)
        self.aux_loss = aux_loss
        return self
