"""Schedules over training: how many experts a token uses, and among how many it may choose."""

from collections.abc import Callable, Iterator
from math import cos, pi
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..modeling.feed_forwards.pooled_moe import PooledMoe
from ..modeling.routers.frozen import Frozen
from ..modeling.routers.top_k import TopK
from .balancing import routers


def linear(start: int, end: int, progress: float) -> int:
    """`round((end - start) t / T) + start`."""
    return round((end - start) * progress) + start


def cosine(start: int, end: int, progress: float) -> int:
    """`end - (end - start) cos(pi t / (2 T))`, rounded: slow at first."""
    return round((start - end) * cos(pi * progress / 2)) + end


def exponential(start: int, end: int, progress: float) -> int:
    """`end - (end - start) 0.99^floor(300 t / T)`, rounded: fast at first."""
    return round((start - end) * 0.99 ** int(300 * progress)) + end


def steps(start: int, end: int, progress: float) -> int:
    """`start` doubled in equal intervals until it is `end`: 1, 2, 4, 8, 16."""
    values = [start]
    while values[-1] != end:
        values.append(min(2 * values[-1], end))
    return values[min(int(len(values) * progress), len(values) - 1)]


SCHEDULES: dict[str, Callable[[int, int, float], int]] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "steps": steps,
}


def growing_routers(model: nn.Module) -> Iterator[Frozen | TopK]:
    """The routers whose number of experts may be set between two steps to anything up to all."""
    for router in routers(model):
        if isinstance(router, Frozen) or (isinstance(router, TopK) and router.num_groups == 1):
            yield router


class TopKSchedule(TrainerCallback):
    """SMoE-Dropout's growing number of experts per token (https://arxiv.org/abs/2303.01610, §3.2).

    Sets `top_k` of every `frozen` or `top_k` router without groups at the start of each optimizer step. It depends on
    the number of the step only, so a resumed run goes on as the first one would have. A saved config keeps its own
    `top_k`: what to evaluate with is the user's choice.

    Args:
        start: experts per token in the first step; the paper's enwik8 run has 8 of 16.
        end: experts per token in the last; None for all, which is the dense model.
        schedule: `linear`, `cosine` (slow at first), `exponential` (fast at first) or `steps` (doubled).
        num_steps: optimizer steps T until `end`; None for the whole training.

    Raises:
        ValueError: unknown schedule; numbers that are not between 1 and the number of experts, or decrease; a model
        without such routers.
    """

    def __init__(
        self, start: int = 1, end: int | None = None, schedule: str = "linear", num_steps: int | None = None
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is unknown; choose from {sorted(SCHEDULES)}.")
        if start < 1 or (end is not None and end < start):
            raise ValueError(f"start={start} and end={end}: the number of experts grows, from at least 1.")
        self.start, self.end, self.schedule, self.num_steps = start, end, SCHEDULES[schedule], num_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        numbers = {router.num_experts for router in growing_routers(model)}
        if not numbers:
            raise ValueError("No router of this model is 'frozen', or 'top_k' without groups.")
        if max(self.start, self.end or 0) > min(numbers):
            raise ValueError(f"start={self.start} and end={self.end} must be at most the {min(numbers)} experts.")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        progress = min(state.global_step / (self.num_steps or state.max_steps), 1.0)
        for router in growing_routers(model):
            router.top_k = self.schedule(self.start, self.end or router.num_experts, progress)


class PoolSchedule(TrainerCallback):
    """ReXMoE's progressive scaling routing (https://arxiv.org/abs/2510.17483, eq. 6) for every `pooled_moe`.

    With N experts of a layer and r layers per pool, a router may choose among N experts until `start`, then among
    `floor((1 + (r - 1) (t - start) / (end - start)) N)`, and among all r N from `end` on. Which ones is the option
    `masking` of the feed-forward. The number depends on the step only, so a resumed run goes on as the first one.

    Args:
        start: optimizer step t_s; the paper's 10,000.
        end: optimizer step t_e; the paper's 30,000.

    Raises:
        ValueError: steps that do not follow each other, a model without pools.
    """

    def __init__(self, start: int = 10_000, end: int = 30_000) -> None:
        if not 0 <= start < end:
            raise ValueError(f"start={start} and end={end}: the pool grows from a step of at least 0 to a later one.")
        self.start, self.end = start, end

    def num_candidates(self, step: int, num_experts: int, pool_size: int) -> int:
        """Experts that may be chosen in a step, between those of the layer and those of the pool."""
        grown = (pool_size - num_experts) * (step - self.start) // (self.end - self.start)
        return num_experts + min(max(grown, 0), pool_size - num_experts)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not any(isinstance(module, PooledMoe) for module in model.modules()):
            raise ValueError("No layer of this model is a 'pooled_moe'.")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, PooledMoe):
                module.num_candidates = self.num_candidates(
                    state.global_step, module.num_experts, module.gate.num_experts
                )
