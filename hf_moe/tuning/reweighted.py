"""Adapters that make another weight of a layer's weight: masks, and what is pruned while it is tuned.

The layer, linear or stacked experts, is run by its own code with the new weight in place of its own. The weight's size
is held once more in memory for the backward pass. Letters: E experts, A rows and B columns of a weight (E, A, B).
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.func import functional_call
from transformers import TrainerCallback

from .expert_subset import FIRST, check_experts
from .replacing import OneKindTuner, StandsIn
from .routed_lora import check_linear

SLOTS: tuple[str, ...] = (
    "first",
    "second",
)  # of stacked experts: what reads and what writes; a linear layer has the first only


class Reweighted(StandsIn):
    """Stands in for a layer; methods say what becomes of its weights.

    Attributes:
        parts: slot -> name of the base's weight.
    """

    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        base: Any = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if hasattr(base, "down_proj") and hasattr(base, "has_gate"):
            check_experts(base_layer, name)
            self.parts = dict(zip(SLOTS, (FIRST[base.has_gate], "down_proj")))
        else:
            check_linear(base_layer, name)
            self.parts = {SLOTS[0]: "weight"}
        self.base_layer, self.layer_name = base_layer, name
        self.configs: dict[str, Any] = {}
        self.kept: dict[str, torch.Tensor] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter that changes nothing yet."""
        self.configs[adapter] = config
        for slot, name in self.parts.items():
            self.make(adapter, slot, getattr(self.get_base_layer(), name), config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        active = [name for name in self.active_adapters if name in self.configs]
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        weights = {name: self.weight_of(slot, active) for slot, name in self.parts.items()}
        return functional_call(self.base_layer, weights, args, kwargs)

    def weight_of(self, slot: str, active: list[str]) -> torch.Tensor:
        """What the adapters make of a weight, one after the other."""
        weight = own = getattr(self.get_base_layer(), self.parts[slot])
        for adapter in active:
            weight = self.changed(adapter, slot, weight)
        return weight.to(own.dtype)

    def make(self, adapter: str, slot: str, weight: torch.Tensor, config: Any) -> None:
        """Create the parameters of an adapter for one weight."""
        raise NotImplementedError

    def changed(self, adapter: str, slot: str, weight: torch.Tensor) -> torch.Tensor:
        """The new weight, in any floating-point type."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base's weights, which are kept until `unmerge`; with `safe_merge`, only by finite ones."""
        chosen = [name for name in adapter_names or self.active_adapters if name in self.configs]
        if not set(chosen) - set(self.merged_adapters):
            return
        if self.merged:
            raise ValueError(f"{self.merged_adapters} are merged into {self.layer_name!r}: unmerge them first.")
        for slot, name in self.parts.items():
            weight, own = self.weight_of(slot, chosen), getattr(self.get_base_layer(), name)
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"NaN or infinite values in the merged weights of {self.layer_name!r}.")
            self.kept[name] = own.data
            own.data = weight.contiguous()
        self.merged_adapters += chosen

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring the base's weights back, bit for bit."""
        for name, weight in self.kept.items():
            getattr(self.get_base_layer(), name).data = weight
        self.kept, self.merged_adapters = {}, []


class ReweightedModel(OneKindTuner):
    """PEFT's tuner for such adapters."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """`hard`, exactly, with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def most_important(scores: torch.Tensor, density: float) -> torch.Tensor:
    """(..., A, B) 1 for the `round(density A B)` largest scores of each matrix, 0 for the others."""
    flat = scores.flatten(-2)
    kept = flat.argsort(dim=-1, descending=True, stable=True)[..., : round(density * flat.shape[-1])]
    return torch.zeros_like(flat).scatter_(-1, kept, 1).view_as(scores)


def layers_of(model: nn.Module, kind: type[Reweighted]) -> Iterator[Any]:
    """Yield the adapted layers of one method.

    Raises:
        ValueError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise ValueError(f"This model has no {kind.__name__} layers.")
    yield from found


class SparsityRamp(TrainerCallback):
    """Lets the sparsity of active PST and ExSSNeT adapters grow from 0 to what their configs say, by the cubic law.

        v_t = v_f (1 - (1 - (t - t_i) / (t_f - t_i))^3)        (Zhu and Gupta, https://arxiv.org/abs/1710.01878)

    It depends on the step only: a resumed run goes on as the first one would.

    Args:
        start: t_i, part of the training after which it begins.
        end: t_f, part of the training after which it is complete; what is left trains at the final sparsity.
    """

    def __init__(self, start: float = 0.0, end: float = 0.7) -> None:
        if not 0 <= start < end <= 1:
            raise ValueError(f"start={start} and end={end}: the ramp lies between 0 and 1, in order.")
        self.start, self.end = start, end

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not any(hasattr(module, "set_sparsity") for module in model.modules()):
            raise ValueError(
                "This model has no adapter whose sparsity could grow: SparsityRamp is for PST and ExSSNeT."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_step_begin(args, state, control, model)  # of the next, and after the last what is saved

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        u = min(max((state.global_step / state.max_steps - self.start) / (self.end - self.start), 0.0), 1.0)
        for module in model.modules():
            if isinstance(module, Reweighted) and hasattr(module, "set_sparsity"):
                module.set_sparsity(1 - (1 - u) ** 3)
