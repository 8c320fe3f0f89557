"""Balance losses, computed per router call from the scores and the selection that were really used.

Letters: N tokens, E experts, K chosen experts per token, B rows, T tokens of a row.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .context import NO_CONTEXT, ForwardContext


def expert_loads(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(E,) how many (token, slot) assignments each expert got, in the dtype of `scores`.

    Args:
        scores: (N, E).
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 is padding and counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
    """
    return (assignments(scores, indices, weights) * real_tokens(scores, token_mask)).sum(0)


def assignments(scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, E) 1 where a token goes to an expert, in the dtype of `scores` (N, E)."""
    return torch.zeros_like(scores).scatter_add_(1, indices, (weights.detach() != 0).to(scores.dtype))


def real_tokens(scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """(N, 1) 1 for a token, 0 for padding."""
    return scores.new_ones(scores.shape[0], 1) if token_mask is None else token_mask[:, None].to(scores.dtype)


def switch_loss(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    loads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Switch Transformer's load-balancing loss `E sum_e f_e P_e` (https://arxiv.org/abs/2101.03961, eq. 4-6).

    `f_e` is the share of all (token, slot) assignments that went to expert e, `P_e` its mean score: perfect balance
    gives 1, collapse onto one expert with probability 1 gives E.

    Args:
        scores: (N, E) router probabilities; gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 is padding and counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
        loads: (E,) assignments to take `f` from instead of this call's: those of the whole optimizer step make it the
            global-batch loss of https://arxiv.org/abs/2501.11873.
    """
    if loads is None:
        loads = expert_loads(scores, indices, weights, token_mask)
    real = real_tokens(scores, token_mask)
    mean_scores = (scores * real).sum(0) / real.sum().clamp(min=1)
    return scores.shape[-1] * (loads / loads.sum().clamp(min=1) * mean_scores).sum()


def switch(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    context: ForwardContext = NO_CONTEXT,
    *,
    loads: torch.Tensor | None = None,
    num_zero_experts: int = 0,
) -> torch.Tensor:
    """`switch_loss` of this call."""
    return switch_loss(scores, indices, weights, context.token_mask)


BALANCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "switch": switch,
}


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


def weighted_losses(router_losses: torch.Tensor, config: Any) -> torch.Tensor:
    """What training adds to the cross-entropy: balance loss and z-loss (3,) by the coefficients of the config; the
    routers' own losses are weighted already."""
    coefs = [config.router_aux_loss_coef, config.router_z_loss_coef, 1.0]
    return (router_losses * router_losses.new_tensor(coefs)).sum()


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
