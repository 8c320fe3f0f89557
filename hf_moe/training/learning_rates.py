"""Learning-rate schedules that Transformers lacks: the power scheduler, and WSD with a constant tail."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_wsd_schedule

SEQUENCE = 4096  # tokens that the power law counts a batch in


def power_rate(tokens: float, batch_tokens: float, a: float = 4.0, b: float = -0.51, eta_max: float = 0.02) -> float:
    """`min(eta_max, beta a n^b)`, n tokens seen, beta the batch in sequences of 4,096 tokens.

    The power scheduler (https://arxiv.org/abs/2408.13359). It needs muP: hidden matrices get this divided by the width
    multiplier. With a = 4.6, the paper's fit of WSD's best rates, 1,024 sequences and 10^13 tokens give 0.0011.

    Args:
        tokens: n, above 0.
        batch_tokens: tokens of one optimizer step.
        a, b, eta_max: the paper's production values.
    """
    return min(eta_max, batch_tokens / SEQUENCE * a * tokens**b)


def get_power_schedule(
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    batch_tokens: float,
    num_warmup_steps: int = 0,
    decay_share: float = 0.1,
    a: float = 4.0,
    b: float = -0.51,
    eta_max: float = 0.02,
) -> LambdaLR:
    """The power scheduler: linear warm-up to the law, the law, and an exponential decay at the end.

    The optimizer's own learning rates are multiplied by the law, so give it 1 (or 1 / width multiplier for hidden
    matrices). The paper decays "exponentially to 0", which no exponential reaches: here to 1 % in the last step.

    Args:
        num_training_steps: of the whole run.
        batch_tokens: tokens of one optimizer step, over all processes.
        num_warmup_steps: from 0 to the law's value.
        decay_share: part of the steps at the end in which the rate falls from the law's value there.

    Raises:
        ValueError: phases that do not fit into the run.
    """
    decay = round(decay_share * num_training_steps)
    start = num_training_steps - decay
    if not 0 <= num_warmup_steps <= start or not 0 <= decay_share <= 1:
        raise ValueError(
            f"num_warmup_steps={num_warmup_steps} and decay_share={decay_share} do not fit into {num_training_steps} "
            "steps."
        )

    def law(step: int) -> float:
        return power_rate(max(step, 1) * batch_tokens, batch_tokens, a, b, eta_max)

    def rate(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps * law(num_warmup_steps)
        if step < start or not decay:
            return law(step)
        return law(start) * 0.01 ** min((step - start + 1) / decay, 1.0)

    return LambdaLR(optimizer, rate)


def get_wsdc_schedule(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    min_lr_ratio: float = 0.1,
    **options: Any,
) -> LambdaLR:
    """Warm-up, stable, decay, constant (PLM, https://arxiv.org/abs/2503.12167): a low rate is held to the end.

    Transformers' `get_wsd_schedule` with all three lengths given: whatever the run has left is the constant phase. The
    lengths of the paper's phases are not known.

    Args:
        min_lr_ratio: rate of the constant phase, above 0; Transformers' warm-up starts there as well.
        options: of `get_wsd_schedule`: `decay_type`, ...

    Raises:
        ValueError: a rate of 0, with which there would be nothing to hold.
    """
    if not 0 < min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio} must be above 0 and at most 1: it is held to the end.")
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_decay_steps=num_decay_steps,
        num_stable_steps=num_stable_steps,
        min_lr_ratio=min_lr_ratio,
        **options,
    )


class WithSchedule(Trainer):
    """Lets a trainer use any schedule: `class MyTrainer(WithSchedule, SFTTrainer): schedule = staticmethod(...)`.

    `schedule(optimizer, num_training_steps)` makes the scheduler; it is saved and resumed like Trainer's own.
    """

    schedule: Callable[[torch.optim.Optimizer, int], Any]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = self.schedule(chosen, num_training_steps)
        return self.lr_scheduler
