"""Says once, and clearly, that numbers have stopped being numbers, and where they did."""

import math
import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling import RouterCall, watch_routers


class ReportNaN(TrainerCallback):
    """Warns once when loss, gradient or router logits are NaN or infinite: in which step, and in which layer first.

    Trainer's own log hides such a loss (`logging_nan_inf_filter`). Nothing is read from the device between two logging
    steps, so the warning comes with the next log; the step it names is the first one that was wrong.

    Args:
        stop: whether the training ends then.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop, self.handles, self.warned = stop, [], False
        self.step = 1
        self.first: dict[str, torch.Tensor] = {}  # what -> the first step in which it was wrong, or infinity

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        self.first, self.warned, self.step = {}, False, state.global_step + 1
        self.handles = [*watch_routers(model, self.see_router), model.register_forward_hook(self.see_loss)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def see_router(self, call: RouterCall) -> None:
        """After every call of a router."""
        if call.gate.training and not call.recomputed:
            self.see(f"the logits of the router {call.layer.name!r}", call.logits)

    def see_loss(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After every forward pass; some trainers compute their loss elsewhere."""
        loss = getattr(output, "loss", None)
        if model.training and torch.is_tensor(loss):
            self.see("the loss", loss)

    @torch.no_grad()
    def see(self, what: str, values: torch.Tensor) -> None:
        """Remember the step if a value is wrong; no transfer to the host."""
        now = torch.where(values.detach().isfinite().all(), math.inf, float(self.step))
        self.first[what] = torch.minimum(self.first[what], now) if what in self.first else now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.warned:
            return
        wrong = {what: step for what, found in self.first.items() if (step := found.item()) < math.inf}
        for key, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
            if not math.isfinite(float((logs or {}).get(key, 0.0))):
                wrong.setdefault(what, state.global_step)
        if not wrong:
            return
        step = min(wrong.values())
        what = next(what for what, when in wrong.items() if when == step)  # routers come in order of depth
        self.warned, control.should_training_stop = True, control.should_training_stop or self.stop
        warnings.warn(
            f"Step {int(step)}: NaN or infinite values in {what}. Go back to the last good checkpoint; lower the "
            "learning rate, clip gradients (max_grad_norm), or keep the routers in float32.",
            stacklevel=2,
        )
