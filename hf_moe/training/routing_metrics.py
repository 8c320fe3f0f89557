"""How evenly experts are used, in Trainer's log: `moe/max_vio` and the rest."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..modeling import MoeLayer, RouterCall, moe_layers, watch_routers
from ..modeling.controllers import max_violation

NEARLY = 0.95  # of the largest possible violation is called a collapse


def routing_metrics(loads: torch.Tensor, slots: float | None = None) -> dict[str, float]:
    """What the loads of one layer say.

    Args:
        loads: (E,) assignments per expert.
        slots: how many assignments there could have been; None: as many as there are.

    Returns:
        `utilization`: the work that experts do of a fair share, `mean_e min(1, c_e / mean(c))`: 1 is fair, k of E
        experts in use give at most k / E. `max_vio`: `max(c) / mean(c) - 1` (https://arxiv.org/abs/2408.15664, §4.1),
        0 is fair. `entropy`: of the shares, divided by log E; 1 is fair. `dead_experts`: how many got nothing.
        `drop_rate`: share of slots that were left unused. All 0 where there was no token.
    """
    total = loads.sum()
    if total == 0:
        return dict.fromkeys(("utilization", "max_vio", "entropy", "dead_experts", "drop_rate"), 0.0)
    shares = loads.double() / total
    entropy = -torch.xlogy(shares, shares).sum() / max(torch.tensor(len(loads)).double().log().item(), 1e-9)
    return {
        "utilization": (shares * len(loads)).clamp(max=1).mean().item(),
        "max_vio": max_violation(loads).item(),
        "entropy": entropy.item(),
        "dead_experts": float((loads == 0).sum()),
        "drop_rate": 0.0 if not slots else 1 - total.item() / slots,
    }


class RoutingMetrics(TrainerCallback):
    """Adds the routing of every logging window to what the trainer logs: TensorBoard, trackio, Weights & Biases.

    Forward passes in training count, over all micro-batches and processes, without padding and without the repetitions
    of activation checkpointing. Keys: `moe/<figure>` is the mean over the layers (`dead_experts` their sum,
    `max_vio_worst` the largest), `moe/layer_<number>/<figure>` one layer's; see `routing_metrics` for the figures.
    A warning is given once, when all tokens of a layer go to as few experts as can be.

    `trainer.add_callback(RoutingMetrics(trainer))`: reporters run before other callbacks, so the figures must go into
    `trainer.log` itself.

    Args:
        trainer: Trainer or one of TRL's.
        max_layers: of how many layers, spread over the depth, figures of their own are logged; 0 for none.

    Raises:
        ValueError: a negative number of layers, a model without MoE layers or whose layers are not known.
    """

    def __init__(self, trainer: Any, max_layers: int = 8) -> None:
        if max_layers < 0:
            raise ValueError(f"max_layers={max_layers} must be at least 0.")
        self.trainer, self.max_layers = trainer, max_layers
        self.layers: list[MoeLayer] = []
        self.handles: list[Any] = []
        self.warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        self.layers = list(moe_layers(model))
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no MoE layers whose routing could be logged.")
        self.empty()
        self.handles = watch_routers(model, self.count)
        self.plain_log = self.trainer.log
        self.trainer.log = self.log  # an attribute of the instance, before its class's method

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if self.handles:
            del self.trainer.log
        self.handles = []

    def empty(self) -> None:
        """Start the next logging window."""
        self.loads: dict[str, torch.Tensor] = {}
        self.slots: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def count(self, call: RouterCall) -> None:
        """After every call of a router."""
        if not call.gate.training or call.recomputed:
            return
        name, mask = call.layer.name, call.token_mask
        used = call.weights != 0
        real = torch.ones_like(used) if mask is None else mask[:, None].expand_as(used)
        experts = call.layer.num_experts + call.layer.num_zero_experts
        loads = torch.bincount(call.indices[used & real], minlength=experts).float()
        self.loads[name] = self.loads.get(name, 0) + loads
        self.slots[name] = self.slots.get(name, 0) + real.sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """In place of `trainer.log`."""
        if "loss" in logs and self.loads:
            figures = self.figures()
            self.warn_of_collapse(figures)
            logs = {**logs, **self.keys(figures)}
            self.empty()
        self.plain_log(logs, *args, **kwargs)

    def figures(self) -> dict[str, dict[str, float]]:
        """Name of the layer -> its figures in this window, over all processes."""
        for tensors in (self.loads, self.slots):
            for tensor in tensors.values():
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(tensor)
        return {name: routing_metrics(loads, self.slots[name].item()) for name, loads in self.loads.items()}

    def keys(self, figures: Mapping[str, dict[str, float]]) -> dict[str, float]:
        """What is logged."""
        names = list(figures)
        found = {}
        for figure in figures[names[0]]:
            values = [figures[name][figure] for name in names]
            found[f"moe/{figure}"] = sum(values) if figure == "dead_experts" else sum(values) / len(values)
        found["moe/max_vio_worst"] = max(figures[name]["max_vio"] for name in names)
        for number in spread(len(names), self.max_layers):
            values = figures[names[number]].items()
            found |= {f"moe/layer_{number:02d}/{figure}": value for figure, value in values}
        return found

    def warn_of_collapse(self, figures: Mapping[str, dict[str, float]]) -> None:
        """Once, about the first layer that uses no more experts than one token does."""
        for layer in self.layers:
            name = layer.name
            most = (layer.num_experts + layer.num_zero_experts) / layer.top_k - 1
            if self.warned or name not in figures or most <= 0 or figures[name]["max_vio"] < NEARLY * most:
                continue
            experts = self.loads[name].topk(layer.top_k).indices.tolist()
            self.warned = True
            warnings.warn(
                f"Step {self.trainer.state.global_step}: the router {name!r} has collapsed onto "
                f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))} "
                f"(MaxVio {figures[name]['max_vio']:.2f} of at most {most:.2f}). Balance it with "
                "hf_moe.training.LoadBalancing() or BiasBalancing(), or lower the routers' learning rate.",
                stacklevel=2,
            )


def spread(count: int, wanted: int) -> Sequence[int]:
    """At most `wanted` of the numbers below `count`, evenly spread, the first and the last among them."""
    if wanted >= count:
        return range(count)
    if wanted < 2:
        return range(wanted)
    return [round(step * (count - 1) / (wanted - 1)) for step in range(wanted)]
