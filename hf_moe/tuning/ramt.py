"""R-AMT: what a pre-trained model knows, through a mask of its weights (https://arxiv.org/abs/2307.15049).

    W' = W * 1[m > threshold],   dL/dm = dL/dW' * W (straight through)

Letters: as in `reweighted`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .peft_types import register
from .reweighted import SLOTS, Reweighted, ReweightedModel, straight_through
from .targets import TargetsConfig


@dataclass
class RamtConfig(TargetsConfig):
    """Options of mask tuning. All values begin above the threshold, so that at first nothing is masked.

    Args:
        target_modules: linear layers and modules of stacked experts; the paper masks attention only.
        initial: value m of every weight at first; the paper has 0.01.
        threshold: above which a weight is kept; 0.005, as recalled from the paper.
    """

    method: ClassVar[str] = "ramt"

    initial: float = field(default=1e-2, metadata={"help": "Value of every weight at first."})
    threshold: float = field(default=5e-3, metadata={"help": "Above which a weight is kept."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial <= self.threshold:
            raise ValueError(f"initial={self.initial} must be above threshold={self.threshold}: a mask begins whole.")


class Ramt(Reweighted):
    """Values (..., A, B) of every weight, in float32."""

    adapter_layer_names = tuple(f"ramt_values_{slot}" for slot in SLOTS)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.ramt_values_first, self.ramt_values_second = nn.ParameterDict(), nn.ParameterDict()

    def make(self, adapter: str, slot: str, weight: torch.Tensor, config: Any) -> None:
        values = torch.full(weight.shape, config.initial, dtype=torch.float32)
        getattr(self, f"ramt_values_{slot}")[adapter] = nn.Parameter(values)

    def changed(self, adapter: str, slot: str, weight: torch.Tensor) -> torch.Tensor:
        values = getattr(self, f"ramt_values_{slot}")[adapter]
        kept = (values > self.configs[adapter].threshold).to(values.dtype)
        return weight * straight_through(kept, values)


def gradient_dropout(
    ce: torch.Tensor, kl: torch.Tensor, level: float, generator: torch.Generator | None = None, eps: float = 1e-12
) -> torch.Tensor:
    """The paper's regularised gradient: where the task and the model's general knowledge disagree, less of it.

        P = (1 + sign(g_ce) (g_ce + g_kl) / (|g_ce| + |g_kl| + eps)) / 2
        g = ((1 - l) + l 1[P > U]) g_ce,   U uniform in [0, 1)

    Args:
        ce: g_ce, gradient of the task's loss, of any shape.
        kl: g_kl, gradient of the divergence from the pre-trained model.
        level: l; 0 leaves g_ce as it is.
    """
    agreement = 0.5 * (1 + ce.sign() * (ce + kl) / (ce.abs() + kl.abs() + eps))
    drawn = torch.rand(ce.shape, generator=generator, device=ce.device)
    return ((1 - level) + level * (agreement > drawn)) * ce


def regularized_backward(
    task_loss: torch.Tensor,
    knowledge_loss: torch.Tensor,
    parameters: Iterable[torch.Tensor],
    level: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """In place of `task_loss.backward()`: adds the regularised gradient to the parameters that train.

    Args:
        task_loss: of the task.
        knowledge_loss: divergence between the model with and without the adapter, on the same inputs.
        parameters: those of others are left alone.
        level: l of `gradient_dropout`.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level={level} must be between 0 and 1.")
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    task, knowledge = (torch.autograd.grad(loss, learning, **options) for loss in (task_loss, knowledge_loss))
    for parameter, ce, kl in zip(learning, task, knowledge):
        gradient = gradient_dropout(ce, kl, level, generator)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class RamtModel(ReweightedModel):
    """PEFT's tuner for `RamtConfig`."""

    prefix, tuner_layer_cls, layer_class = "ramt_", Ramt, Ramt


register("ramt", RamtConfig, RamtModel)
