"""Sparse pre-training: weights are pruned while the model learns (https://arxiv.org/abs/2501.12486).

Of the paper's 80 schedules the best begins at 25% of the training compute and ends at 75%, and the Chinchilla law
holds with the average number of live parameters in place of N. Letters: N_0 and N_f live parameters before and after,
u, c and x the parts of the pruning phase, of the compute and of the optimizer steps that are over.
"""

from collections.abc import Callable, Iterator
from math import log
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .parameters import group_of_each

KEPT_DENSE = ("router", "embeddings", "norms")
POINTS = 4096  # of the integral that turns steps into compute


def cubic(initial: float, final: float, u: Any) -> Any:
    """`N_f + (N_0 - N_f) (1 - u)^3` (Zhu and Gupta, https://arxiv.org/abs/1710.01878): fast at first."""
    return final + (initial - final) * (1 - u) ** 3


def linear(initial: float, final: float, u: Any) -> Any:
    """`N_0 + (N_f - N_0) u`."""
    return initial + (final - initial) * u


def geometric(initial: float, final: float, u: Any) -> Any:
    """`N_0 (N_f / N_0)^u`: the same part of what is left each time."""
    return initial * (final / initial) ** u


CURVES: dict[str, Callable[[float, float, Any], Any]] = {
    "cubic": cubic,
    "linear": linear,
    "geometric": geometric,
}


def average_parameter_count(
    initial: float, final: float, start: float = 0.25, end: float = 0.75, curve: str = "cubic"
) -> float:
    """Mean number of live parameters over training: `start N_0 + (end - start) mean + (1 - end) N_f`.

    The mean over the pruning phase is `N_f + (N_0 - N_f) / 4` (cubic), `(N_0 + N_f) / 2` (linear) or
    `(N_0 - N_f) / ln(N_0 / N_f)` (geometric). It is the mean over whatever `start` and `end` are parts of: over
    tokens, which is what the scaling law wants, if they are parts of the steps. For parts of the compute take
    `SparsePretraining.average_parameter_count`: with a shrinking model the two are not the same.

    Args:
        initial: N_0; final: N_f.
        start, end: where the pruning phase begins and ends, in [0, 1].

    Raises:
        ValueError: parts or counts out of order, unknown curve.
    """
    check(start, end, curve)
    if not 0 < final <= initial:
        raise ValueError(f"final={final} must be above 0 and at most initial={initial}.")
    middle = {
        "cubic": final + (initial - final) / 4,
        "linear": (initial + final) / 2,
        "geometric": initial if initial == final else (initial - final) / log(initial / final),
    }[curve]
    return start * initial + (end - start) * middle + (1 - end) * final


class SparsePretraining(TrainerCallback):
    """Prunes the smallest weights of every matrix, a few at a time, while the rest goes on learning.

    Matrices of attention, feed-forwards and each single expert get the same sparsity; routers, embeddings, heads,
    norms and biases stay dense. A pruned weight stays 0. The schedule depends on the step only, and a resumed run
    reads from the weights what is pruned, so that it goes on as the first one would. Zeros save neither time nor
    memory with dense kernels: this is the paper's training, not a speed-up.

    Compute is counted as live parameters times steps of equal size, all parameters alike; how the paper counts experts
    that a token does not use, and its curve between the two ends, are not known.

    Args:
        sparsity: part of the prunable weights that is 0 in the end.
        start, end: parts of the training where pruning begins and ends; the paper's best are 0.25 and 0.75.
        of: what they are parts of: `compute` (the paper) or `steps`.
        curve: of the number of live parameters: `cubic`, `linear` or `geometric`.
        every: optimizer steps from one pruning to the next.

    Attributes:
        live: live parameters after the last pruning, of `initial`.

    Raises:
        ValueError: numbers out of range, an unknown curve, sharded or frozen weights.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        start: float = 0.25,
        end: float = 0.75,
        of: str = "compute",
        curve: str = "cubic",
        every: int = 100,
    ) -> None:
        check(start, end, curve)
        if not 0 < sparsity < 1 or every < 1 or of not in ("compute", "steps"):
            raise ValueError(
                f"sparsity={sparsity} must be between 0 and 1, every={every} at least 1, and of={of!r} 'compute' or "
                "'steps'."
            )
        self.sparsity, self.start, self.end, self.of = sparsity, start, end, of
        self.curve, self.every = CURVES[curve], every
        self.masks: dict[nn.Parameter, torch.Tensor | None] = {}
        self.initial, self.prunable, self.live = 0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = list(prunable_weights(model))
        if not all(weight.requires_grad for weight in weights):
            raise ValueError(
                "SparsePretraining prunes what trains, and this model has frozen weights: train all of them."
            )
        self.initial = sum(parameter.numel() for parameter in model.parameters())
        self.prunable = sum(weight.numel() for weight in weights)
        started = self.sparsity_at(state.global_step / state.max_steps) > 0
        self.masks = {weight: weight.detach() != 0 if started else None for weight in weights}
        self.live = self.count()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        before, sparsity = (self.sparsity_at(done / state.max_steps) for done in (step - 1, step))
        prunes = sparsity > before and (step % self.every == 0 or sparsity == self.sparsity)
        for weight, mask in self.masks.items():
            if prunes:
                mask = self.masks[weight] = largest(weight.detach(), sparsity)
            if mask is not None:
                weight.data.mul_(mask)
        if prunes:
            self.live = self.count()

    def count(self) -> float:
        """Parameters that are not pruned."""
        return self.initial - sum(int((~mask).sum()) for mask in self.masks.values() if mask is not None)

    @property
    def final(self) -> float:
        """N_f."""
        return self.initial - self.sparsity * self.prunable

    def live_at(self, progress: Any) -> torch.Tensor:
        """Live parameters the schedule wants where a part of the training, in its own unit, is over."""
        u = (torch.as_tensor(progress, dtype=torch.float64) - self.start) / (self.end - self.start)
        return self.curve(self.initial, self.final, u.clamp(0, 1))

    def sparsity_at(self, steps: float) -> float:
        """The sparsity of prunable weights where a part of the steps is over."""
        progress = steps if self.of == "steps" else self.compute_at(steps)
        if progress >= self.end:
            return self.sparsity
        return (self.initial - self.live_at(progress)).item() / self.prunable

    def compute_at(self, steps: float) -> float:
        """The part c of the compute where a part x of the steps is over: `dx ~ dc / N(c)`."""
        grid = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)
        pace = 1 / self.live_at(grid)
        done = torch.cat([pace.new_zeros(1), torch.cumulative_trapezoid(pace, grid)])
        done = done / done[-1]
        after = int(torch.searchsorted(done, steps).clamp(1, POINTS))
        part = (steps - done[after - 1]) / (done[after] - done[after - 1])
        return float(grid[after - 1] + part.clamp(0, 1) * (grid[after] - grid[after - 1]))

    def average_parameter_count(self) -> float:
        """Mean of live parameters over tokens, the N of the scaling law; known once training has begun."""
        if self.of == "steps":
            curve = next(name for name, function in CURVES.items() if function is self.curve)
            return average_parameter_count(self.initial, self.final, self.start, self.end, curve)
        grid = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)
        pace = 1 / self.live_at(grid)
        return 1 / torch.trapezoid(pace, grid).item()  # the harmonic mean over compute


def check(start: float, end: float, curve: str) -> None:
    """Raise `ValueError` if a schedule cannot be."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"start={start} and end={end}: the pruning phase lies between 0 and 1, in order.")
    if curve not in CURVES:
        raise ValueError(f"curve={curve!r} is unknown; choose from {sorted(CURVES)}.")


def prunable_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield matrices and stacks of expert matrices, each once, without routers, embeddings, heads and norms."""
    kinds = group_of_each(model)
    linear_weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        expert_stack = kinds[name] in ("experts", "attention_experts") and parameter.dim() == 3
        if kinds[name] in KEPT_DENSE or not (parameter in linear_weights or expert_stack):
            continue
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            raise ValueError(f"{name!r} is {type(parameter.data).__name__}: SparsePretraining prunes whole weights.")
        yield parameter


def largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for the largest weights of each matrix of (..., A, B), of which `round(sparsity A B)` are left out."""
    sizes = weight.abs().flatten(-2)
    pruned = sizes.argsort(dim=-1, stable=True)[..., : round(sparsity * sizes.shape[-1])]
    return torch.ones_like(sizes, dtype=torch.bool).scatter_(-1, pruned, False).view_as(weight)
