"""Skips optimizer steps whose loss or gradient leaps out of what the run has seen lately (OLMo's SkipStep)."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode


class SpikeSkipping(TrainerCallback, ExportableState):
    """Says which steps to skip: those whose loss or gradient norm exceeds mean + `sigmas` standard deviations.

    The mean and the deviation are those of the last `window` steps, the present one not among them; skipped ones enter
    the window, so that a lasting change of scale is accepted after a while. A loss or norm that is not finite is
    skipped whenever it comes, and does not enter. The rule is that of OLMo-core's SkipStep optimizers. The window is
    saved in checkpoints: a resumed run decides as the first one would.

    The mixin `SkipsSpikes` measures and skips. Give this callback to the trainer for other numbers than its own.

    Args:
        sigmas: standard deviations.
        window: of how many steps the loss and the norm are remembered.
        min_steps: steps before the first that may be skipped for its size; None: half the window.

    Attributes:
        skipped: the optimizer steps that were skipped, counted from 0.

    Raises:
        ValueError: values that leave nothing to compare with; a trainer without the mixin.
    """

    def __init__(self, sigmas: float = 6.0, window: int = 128, min_steps: int | None = None) -> None:
        self.sigmas, self.window = sigmas, window
        self.min_steps = max(window // 2, 2) if min_steps is None else min_steps
        if sigmas <= 0 or window < 2 or not 2 <= self.min_steps <= window:
            raise ValueError(
                f"sigmas={sigmas} must be above 0, window={window} at least 2, min_steps={self.min_steps} from 2 to "
                "the window."
            )
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.skipped: list[int] = []
        self.measured = -1  # the step that the mixin has measured

    def state(self) -> dict[str, Any]:
        arguments = {"sigmas": self.sigmas, "window": self.window, "min_steps": self.min_steps}
        return {
            "args": arguments,
            "attributes": {"losses": self.losses, "norms": self.norms, "skipped": self.skipped},
        }

    def is_spike(self, step: int, loss: float, norm: float) -> bool:
        """Judge a step by its loss and the norm of its gradient before clipping, and remember them."""
        judged = [self.leaps(loss, self.losses), self.leaps(norm, self.norms)]
        self.losses, self.norms = self.remember(self.losses, loss), self.remember(self.norms, norm)
        self.measured = step
        if any(judged):
            self.skipped.append(step)
        return any(judged)

    def leaps(self, value: float, past: list[float]) -> bool:
        """Whether a value is too large beside those before it."""
        if not math.isfinite(value):
            return True
        return len(past) >= self.min_steps and value > fmean(past) + self.sigmas * stdev(past)

    def remember(self, past: Iterable[float], value: float) -> list[float]:
        """The values of the next step's window."""
        return list(deque([*past, value] if math.isfinite(value) else past, maxlen=self.window))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer restores callbacks only if told to: a resumed run needs the window in any case."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved is not None:
            for name, value in (saved[0] if isinstance(saved, list) else saved)["attributes"].items():
                setattr(self, name, value)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.measured != state.global_step:
            raise ValueError("SpikeSkipping needs its mixin: class MyTrainer(SkipsSpikes, Trainer): ...")


class SkipsSpikes(Trainer):
    """Leaves weights and optimizer as they are in steps that spike: `class MyTrainer(SkipsSpikes, SFTTrainer): ...`.

    A skipped step drops its gradients before the optimizer runs: no weight, moment or weight decay changes. The step
    counts as done and the learning-rate schedule goes on; the log has the loss, the norm that was found, and
    `skipped_steps`, how many there are so far. Loss and norm are those of the whole step: all micro-batches and
    processes, before clipping. They are read every step, which waits for the device.

    Raises:
        ValueError: DeepSpeed, which keeps gradients to itself; `torch.nn.DataParallel`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError("SkipsSpikes can skip no steps of DeepSpeed or DataParallel; train with DDP or FSDP.")
        if not any(isinstance(callback, SpikeSkipping) for callback in self.callback_handler.callbacks):
            self.add_callback(SpikeSkipping())
        self.step_losses: list[torch.Tensor] = []

    @property
    def spike_skipping(self) -> SpikeSkipping:
        """The callback; Trainer makes a new one when it resumes."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, SpikeSkipping))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer asks for it in every step, before the optimizer's."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack(self.step_losses).sum()
        self.step_losses = []
        loss = self.accelerator.gather(loss).mean().item()  # pyright: ignore[reportAttributeAccessIssue]
        if self.spike_skipping.is_spike(self.state.global_step, loss, float(norm)):
            model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["skipped_steps"] = len(self.spike_skipping.skipped)
        super().log(logs, *args, **kwargs)
