"""Load balancing over whole optimizer steps: the counts that routers keep, and what is made of them.

A bare loop calls `update_biases` and `empty_loads` after `optimizer.step()`; Trainer has callbacks that do.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..modeling import DecoderModel
from ..modeling.controllers import CONTROLLERS
from ..modeling.routers import Router
from .native import NativeLoads


def routers(model: nn.Module) -> Iterator[Router]:
    """The routers of a model, also under the wrappers that trainers put around it."""
    return (module for module in model.modules() if isinstance(module, Router))


def empty_loads(model: nn.Module) -> None:
    """Start the next optimizer step: every router counts anew."""
    for router in routers(model):
        router.empty_loads()


@torch.no_grad()
def update_biases(
    model: nn.Module,
    rate: float = 1e-3,
    controller: str = "sign",
    step: int = 1,
    num_true_experts: float | None = None,
) -> None:
    """Move the selection bias of every router by what the experts got since the loads were emptied.

    Args:
        model: after the forward passes of one optimizer step; processes hold the same counts already.
        rate: u of the controller.
        controller: a name in `modeling.controllers.CONTROLLERS`.
        step: n of a controller whose rate decreases; the first step is 1.
        num_true_experts: `K_e` of the controller `true_experts`.
    """
    for router in routers(model):
        bias = router.e_score_correction_bias
        if bias is None or router.loads is None:
            continue
        zero, true_share = router.num_zero_experts, num_true_experts and num_true_experts / router.top_k
        moves = CONTROLLERS[controller](router.loads, rate, step=step, num_zero_experts=zero, true_share=true_share)
        bias += moves.to(bias.device)


@torch.no_grad()
def count_ahead(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Count the assignments of all micro-batches of one optimizer step before the first is trained on.

    The counts, and with them the global-batch loss, are then those of the whole step in every micro-step. It costs one
    forward pass more, which draws the same random numbers as the one with gradients.

    Args:
        model: in training mode; `empty_loads` ends the step.
        batches: keyword arguments of `model`, labels not needed.
    """
    empty_loads(model)
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(gpus), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # checkpointing without a backward
        for batch in batches:
            model(**batch)
    for router in routers(model):
        router.counts_ahead = True


class BiasBalancing(TrainerCallback):
    """Balancing without a loss (https://arxiv.org/abs/2408.15664): moves the selection biases after an optimizer step.

    The counts are of all micro-batches on all processes, without padding. The biases are fp32 buffers: saved with the
    model, not seen by the optimizer, restored by `resume_from_checkpoint`. Transformers' own models with such biases
    (DeepSeek-V3, GLM-4.5, ...), which nothing else moves, are balanced as well.

    Args:
        rate: u, or a function of the step (from 0) that gives it: DeepSeek-V3 has 0.001, then 0 for the last tokens.
        controller: `sign`, `sign_zero_mean` (Ling 2.0), `proportional`, `inverse_sqrt`, `inverse` or `true_experts`
            (LongCat-Flash): see `modeling/controllers.py`.
        num_true_experts: how many true experts a token shall use on average; for `true_experts` only.

    Raises:
        ValueError: unknown controller, a number of true experts without that controller or beyond its routers; a model
            without selection biases, or of a family whose MoE layers are not known.
    """

    def __init__(
        self,
        rate: float | Callable[[int], float] = 1e-3,
        controller: str = "sign",
        num_true_experts: float | None = None,
    ) -> None:
        if controller not in CONTROLLERS:
            raise ValueError(f"controller={controller!r} is unknown; choose from {sorted(CONTROLLERS)}.")
        if (controller == "true_experts") != (num_true_experts is not None):
            raise ValueError("num_true_experts and controller='true_experts' belong together: give both or neither.")
        self.rate, self.controller, self.num_true_experts = rate, controller, num_true_experts
        self.native: NativeLoads | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        biased = [router for router in routers(model) if router.e_score_correction_bias is not None]
        if not any(isinstance(module, DecoderModel) for module in model.modules()):
            self.native = NativeLoads(model)
            if all(layer.selection_bias is None for layer in self.native.layers):
                self.on_train_end(args, state, control)
                raise ValueError(f"No router of {type(model).__name__} has a selection bias.")
        elif not biased:
            raise ValueError("No router of this model has a selection bias; give them selection_bias=True.")
        if self.num_true_experts is not None:
            most = min((router.top_k for router in biased), default=0)
            if not 0 < self.num_true_experts < most or any(not router.num_zero_experts for router in biased):
                raise ValueError(
                    f"num_true_experts={self.num_true_experts} must lie between 0 and the {most} experts that a token "
                    "chooses, and needs num_zero_experts in every layer with a selection bias."
                )
        empty_loads(model)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rate = self.rate(state.global_step) if callable(self.rate) else self.rate
        step, controller = state.global_step + 1, CONTROLLERS[self.controller]
        update_biases(model, rate, self.controller, step, self.num_true_experts)
        for layer, loads in self.native.of_biased() if self.native else ():
            zero, true_share = layer.num_zero_experts, self.num_true_experts and self.num_true_experts / layer.top_k
            moves = controller(loads, rate, step=step, num_zero_experts=zero, true_share=true_share)
            bias = layer.selection_bias
            assert bias is not None
            bias += moves.to(bias.device)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        empty_loads(model)  # after every callback has read them
        if self.native is not None:
            self.native.empty()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.native is not None:
            self.native.remove()
            self.native = None
