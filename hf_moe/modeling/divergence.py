"""How far the predictions of two models, or of two passes, are apart.

Letters: B rows, T tokens, N counted tokens, V vocabulary.
"""

from collections.abc import Callable

import torch


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(N,) `KL(teacher || student)` of log-probabilities (N, V): the student covers what the teacher may say."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(N,) `KL(student || teacher)` of log-probabilities (N, V): the student says what the teacher would (MiniLLM)."""
    return forward_kl(teacher, student)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(N,) mean of both divergences to the mixture (p + q) / 2; at most log 2."""
    mixture = torch.logsumexp(torch.stack([student, teacher]), 0) - torch.log(student.new_tensor(2.0))
    return 0.5 * (forward_kl(mixture, student) + forward_kl(mixture, teacher))


def symmetric_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(N,) `(KL(p || q) + KL(q || p)) / 2 = sum (p - q) (log p - log q) / 2` (THOR)."""
    return 0.5 * ((student.exp() - teacher.exp()) * (student - teacher)).sum(-1)


def top_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, top: int = 8) -> torch.Tensor:
    """(N,) `-sum p_T log p_S` over the `top` likeliest tokens of the teacher, whose probabilities are not normalised
    again. Unlike a divergence it has a gradient where student and teacher are the same (SlimMoE's sensitivity)."""
    likely, where = teacher.topk(min(top, teacher.shape[-1]), dim=-1)
    return -(likely.exp() * student.gather(-1, where)).sum(-1)


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "symmetric_kl": symmetric_kl,
    "top_cross_entropy": top_cross_entropy,
}


def divergence(
    name: str,
    logits: torch.Tensor,
    other_logits: torch.Tensor,
    counted: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean over the counted tokens of a divergence, times the temperature squared (Hinton, so that the size of the
    gradient stays); in float32 or better.

    Args:
        name: in `DIVERGENCES`.
        logits: (B, T, V) of the student or one pass; other_logits: of the teacher or the other pass.
        counted: (B, T) True where a label is predicted.
        num_items: counted tokens of the whole optimizer step; by default those of this call.
        temperature: both logits are divided by it.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    pair = (x[counted].to(precise).div(temperature).log_softmax(-1) for x in (logits, other_logits))
    total = DIVERGENCES[name](*pair).sum() * temperature**2
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)
