"""ExSSNeT: a mask per task, and weights that only one task trains (https://arxiv.org/abs/2210.10209).

    1. find a mask:      W' = W * m,  m = 1 for the largest `density` of |s|;  only the scores s learn
    2. train weights:    W' = (W + delta) * m;  delta learns where m = 1 and no earlier task trained

so that no task changes what an earlier one uses. Letters: as in `reweighted`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from .peft_types import register
from .reweighted import SLOTS, Reweighted, ReweightedModel, layers_of, most_important, straight_through
from .routed_lora import low_rank
from .targets import TargetsConfig


@dataclass
class ExssnetConfig(TargetsConfig):
    """Options of ExSSNeT.

    The paper masks random weights from the first step on. Here a mask begins whole, so that a pre-trained model is
    what it was, and `SparsityRamp` or `set_density` prunes to `density`: `set_density(model, config.density)` before
    training is the paper's way.

    Args:
        target_modules: linear layers and modules of stacked experts; each expert has its own share.
        density: part of each matrix that a task keeps (the released code calls it sparsity).
    """

    method: ClassVar[str] = "exssnet"

    density: float = field(default=0.1, metadata={"help": "Part of each matrix that is kept."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1.")


class Exssnet(Reweighted):
    """Scores and delta (..., A, B) of every weight; where delta may learn."""

    adapter_layer_names = tuple(f"exssnet_{what}_{slot}" for what in ("scores", "delta") for slot in SLOTS)
    buffers_by_name = tuple(
        f"exssnet_{what}" for what in ("density", "found", *(f"exclusive_{slot}" for slot in SLOTS))
    )
    other_param_names = (*Reweighted.other_param_names, *buffers_by_name)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for dictionary in self.adapter_layer_names:
            setattr(self, dictionary, nn.ParameterDict())
        for dictionary in self.buffers_by_name:
            setattr(self, dictionary, BufferDict(persistent=True))

    def make(self, adapter: str, slot: str, weight: torch.Tensor, config: Any) -> None:
        self.of("scores", slot)[adapter] = low_rank(*weight.shape)
        self.of("delta", slot)[adapter] = nn.Parameter(torch.zeros(weight.shape))
        self.of("exclusive", slot)[adapter] = torch.zeros(weight.shape, dtype=torch.bool)
        self.density_of[adapter] = torch.ones(1)
        self.found[adapter] = torch.zeros(1, dtype=torch.bool)

    @property
    def density_of(self) -> Any:
        """Name of an adapter -> (1,) what part it keeps now."""
        return self.exssnet_density

    @property
    def found(self) -> Any:
        """Name of an adapter -> (1,) whether its mask is found, and its scores learn no more. PEFT lets all parameters
        of an adapter learn whenever it is loaded or chosen."""
        return self.exssnet_found

    def of(self, what: str, slot: str) -> Any:
        """Name of an adapter -> its `scores`, `delta` or `exclusive` of a slot."""
        return getattr(self, f"exssnet_{what}_{slot}")

    def set_sparsity(self, part: float) -> None:
        """Prune active adapters to a part of their final sparsity."""
        for adapter in self.active_adapters:
            if adapter in self.configs:
                self.density_of[adapter].fill_(1 - part * (1 - self.configs[adapter].density))

    def mask(self, adapter: str, slot: str) -> torch.Tensor:
        """(..., A, B) 1 for what a task keeps, with the gradient of |s|."""
        sizes = self.of("scores", slot)[adapter].abs()
        sizes = sizes.detach() if self.found[adapter].item() else sizes
        return straight_through(most_important(sizes, self.density_of[adapter].item()), sizes)

    def changed(self, adapter: str, slot: str, weight: torch.Tensor) -> torch.Tensor:
        delta, learns = (self.of(what, slot)[adapter] for what in ("delta", "exclusive"))
        own = torch.where(learns, delta, delta.detach())
        return (weight + own) * self.mask(adapter, slot)


def set_density(model: nn.Module, density: float) -> None:
    """Prune the masks of the active adapters to a density at once, in place of a `SparsityRamp`."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must be above 0 and at most 1.")
    for layer in layers_of(model, Exssnet):
        for adapter in layer.active_adapters:
            layer.density_of[adapter].fill_(density)


@torch.no_grad()
def train_weights(model: nn.Module, adapter: str = "default", earlier: Sequence[str] = ()) -> float:
    """Go from finding a mask to training weights: scores stop learning, delta learns what no earlier task has.

    Train with `weight_decay=0`: it would shrink what earlier tasks trained in this adapter's copy.

    Args:
        model: with the adapter, and those of earlier tasks.
        adapter: of the task.
        earlier: adapters of earlier tasks. What they trained is there from now on, as in one bank of weights.

    Returns:
        Part of the task's weights that it may train.

    Raises:
        ValueError: adapters that a layer has not.
    """
    kept = exclusive = 0
    for layer in layers_of(model, Exssnet):
        if missing := [name for name in (adapter, *earlier) if name not in layer.configs]:
            raise ValueError(f"{layer.layer_name!r} has no adapter {missing[0]!r}; it has {sorted(layer.configs)}.")
        layer.found[adapter].fill_(True)
        for slot in layer.parts:
            mask = layer.mask(adapter, slot) > 0
            taken = torch.zeros_like(mask)
            for name in earlier:
                taken |= layer.mask(name, slot) > 0
                trained = layer.of("exclusive", slot)[name]
                layer.of("delta", slot)[adapter][trained] = layer.of("delta", slot)[name][trained]
            layer.of("exclusive", slot)[adapter] = mask & ~taken
            layer.of("scores", slot)[adapter].requires_grad_(False)
            kept, exclusive = kept + int(mask.sum()), exclusive + int((mask & ~taken).sum())
    return exclusive / max(kept, 1)


@torch.no_grad()
def copy_scores(model: nn.Module, source: str, target: str) -> None:
    """Begin a task's mask where another's ended (the paper's KKT, after `nearest_task` has found which)."""
    for layer in layers_of(model, Exssnet):
        for slot in layer.parts:
            layer.of("scores", slot)[target].copy_(layer.of("scores", slot)[source])


def nearest_task(features: Mapping[str, torch.Tensor], labels: torch.Tensor, neighbours: int = 10) -> str:
    """The earlier task whose masked model tells the new task's classes apart best, by k nearest neighbours.

    Args:
        features: task -> (N, D) of the same N examples of the new task, through that task's adapter.
        labels: (N,) classes.
        neighbours: k.

    Returns:
        The task with the highest leave-one-out accuracy; of equal ones, the first.
    """
    accuracy = {}
    for task, x in features.items():
        distances = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
        nearest = labels[distances.topk(min(neighbours, len(x) - 1), largest=False).indices]
        accuracy[task] = (nearest.mode(-1).values == labels).double().mean().item()
    return max(accuracy, key=lambda task: accuracy[task])


class ExssnetModel(ReweightedModel):
    """PEFT's tuner for `ExssnetConfig`."""

    prefix, tuner_layer_cls, layer_class = "exssnet_", Exssnet, Exssnet


register("exssnet", ExssnetConfig, ExssnetModel)
