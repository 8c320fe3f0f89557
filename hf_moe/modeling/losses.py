"""Balance losses, computed per router call from the scores and the selection that were really used.

Letters: N tokens, E experts, K chosen experts per token, B rows, T tokens of a row.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .context import ForwardContext


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


def shares(scores: torch.Tensor) -> torch.Tensor:
    """(N, E) the scores of each token divided by their sum: what DeepSeek-V3 does to sigmoid scores
    (https://arxiv.org/abs/2412.19437, eq. 19). Softmax scores are their shares already."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def load_shares(loads: torch.Tensor) -> torch.Tensor:
    """(..., E) loads divided by their sum over the experts; zeros where nobody was chosen."""
    return loads / loads.sum(-1, keepdim=True).clamp(min=1)


def switch_loss(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    loads: torch.Tensor | None = None,
    num_zero_experts: int = 0,
) -> torch.Tensor:
    """Switch Transformer's load-balancing loss `E sum_e f_e P_e` (https://arxiv.org/abs/2101.03961, eq. 4-6).

    `f_e` is the share of all (token, slot) assignments that went to expert e, `P_e` the mean of its share of a token's
    scores: perfect balance gives 1, collapse onto one expert with probability 1 gives E. DeepSeekMoE's expert-level
    loss (https://arxiv.org/abs/2401.06066, eq. 12-14) is the same number.

    Args:
        scores: (N, E) what the router gave every expert; gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 is padding and counts as no assignment.
        token_mask: (N,) True for real tokens; None if all are.
        loads: (E,) assignments to take `f` from instead of this call's: those of the whole optimizer step make it the
            global-batch loss of https://arxiv.org/abs/2501.11873.
        num_zero_experts: Z; the last Z experts get one and the same `f_e`, their mean (AdaMoE,
            https://arxiv.org/abs/2406.13233): which of them is chosen does not matter.
    """
    if loads is None:
        loads = expert_loads(scores, indices, weights, token_mask)
    real = real_tokens(scores, token_mask)
    mean_shares = (shares(scores) * real).sum(0) / real.sum().clamp(min=1)
    fractions = load_shares(loads)
    if num_zero_experts:
        true, zero = fractions[:-num_zero_experts], fractions[-num_zero_experts:]
        fractions = torch.cat([true, zero.mean().expand(num_zero_experts)])
    return scores.shape[-1] * (fractions * mean_shares).sum()


def sequence_loss(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    sequence_ids: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise loss (https://arxiv.org/abs/2412.19437, eq. 17-20; DeepSeek-V2 has it with softmax).

    `E sum_e f_e P_e` within each sequence, averaged over the sequences by their numbers of tokens, so that it does not
    depend on how they are cut into batches. Perfect balance in every sequence gives 1, collapse gives E, and so does a
    sequence that uses one expert with probability 1 although others use others. The paper's weight is 0.0001.

    Args:
        scores: (N, E) softmax or sigmoid scores; gradient flows through these.
        indices: (N, K) chosen experts.
        weights: (N, K) combine weights; a slot of weight 0 is padding and counts as no assignment.
        sequence_ids: (N,) numbers below N; equal for the tokens of one sequence.
        token_mask: (N,) True for real tokens; None if all are.
    """
    real = real_tokens(scores, token_mask)
    empty = torch.zeros_like(scores)  # a row per sequence, at the number of its first token; most stay empty
    chosen = empty.index_add(0, sequence_ids, assignments(scores, indices, weights) * real)
    share_sums = empty.index_add(0, sequence_ids, shares(scores) * real)  # P_e times the sequence's tokens
    return scores.shape[-1] * (load_shares(chosen) * share_sums).sum() / real.sum().clamp(min=1)


def importance_loss(values: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Importance loss `CV^2 = Var_e(I_e) / Mean_e(I_e)^2` (https://arxiv.org/abs/1701.06538, eq. 6-7).

    `I_e` sums what the tokens give expert e: their combine weights in the paper, their scores in V-MoE
    (https://arxiv.org/abs/2106.05974). Perfect balance gives 0, collapse onto one expert gives E - 1: the variance is
    the population's, divided by E.

    Args:
        values: (N, E); gradient flows through these.
        token_mask: (N,) True for real tokens; None if all are.
    """
    totals = (values * real_tokens(values, token_mask)).sum(0)
    mean = totals.mean()
    return (totals - mean).square().mean() / mean.square().clamp(min=torch.finfo(values.dtype).eps)


def switch(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, context: ForwardContext, **others: Any
) -> torch.Tensor:
    """`switch_loss` of this call; experts that compute nothing are experts like others, as in AdaMoE's code."""
    return switch_loss(scores, indices, weights, context.token_mask)


def averaged_null(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    context: ForwardContext,
    *,
    num_zero_experts: int,
    **others: Any,
) -> torch.Tensor:
    """`switch_loss` of this call with AdaMoE's mean load for the experts that compute nothing, as the paper words it.

    Perfect balance gives 1, collapse onto one true expert E, onto experts that compute nothing E / Z.
    """
    return switch_loss(scores, indices, weights, context.token_mask, None, num_zero_experts)


def sequence(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, context: ForwardContext, **others: Any
) -> torch.Tensor:
    """`sequence_loss` of the rows of this call, or of the sequences packed into them."""
    return sequence_loss(scores, indices, weights, context.sequence_ids(scores), context.token_mask)


def global_batch(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    context: ForwardContext,
    *,
    loads: torch.Tensor | None,
    **others: Any,
) -> torch.Tensor:
    """`switch_loss` with the loads of the whole optimizer step so far, over all processes
    (https://arxiv.org/abs/2501.11873, §3): domains may specialise within a micro-batch.

    The mean over the processes is exactly the loss of their common batch. Under gradient accumulation an early
    micro-step has not seen the loads of later ones, as in the paper; `hf_moe.training.CountsAhead` counts them before.
    Needs `hf_moe.training.LoadBalancing`, which empties the loads after each optimizer step.
    """
    return switch_loss(scores, indices, weights, context.token_mask, loads)


def importance(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, context: ForwardContext, **others: Any
) -> torch.Tensor:
    """`importance_loss` of the combine weights of this call, as Shazeer et al. define it. Weights that are always 1
    (one expert per token, normalised) have no gradient: there, choose `score_importance`."""
    values = torch.zeros_like(scores).scatter_add(1, indices, weights.to(scores.dtype))
    return importance_loss(values, context.token_mask)


def score_importance(
    scores: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, context: ForwardContext, **others: Any
) -> torch.Tensor:
    """`importance_loss` of the scores of this call, chosen or not, as in V-MoE."""
    return importance_loss(shares(scores), context.token_mask)


def importance_load(
    scores: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    context: ForwardContext,
    *,
    chances: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """`CV^2(importance) + CV^2(load)` (https://arxiv.org/abs/1701.06538, eq. 6-11) as LLaMA-MoE's code adds them up.

    Importance is that of `importance`; the load of an expert is the sum of its `chances` (N, E), or, from routers that
    know none, its number of tokens, which has no gradient. The variance is a sample's, divided by E - 1: collapse
    onto one expert gives 2 E, perfect balance 0.
    """
    load = assignments(scores, indices, weights) if chances is None else chances
    both = importance(scores, indices, weights, context) + importance_loss(load, context.token_mask)
    return both * (scores.shape[-1] / max(scores.shape[-1] - 1, 1))


# (scores, indices, weights, context, loads=, num_zero_experts=, chances=) -> scalar
BALANCE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "switch": switch,
    "averaged_null": averaged_null,
    "sequence": sequence,
    "global": global_batch,
    "importance": importance,
    "score_importance": score_importance,
    "importance_load": importance_load,
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
