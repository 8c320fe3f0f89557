"""Which parameters of a mixture train, how fast, and in what precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modeling import moe_layers
from ..modeling.router_calls import read_gate, replace_in
from ..modeling.routers import Router

GROUPS = ("router", "experts", "shared_experts", "attention_experts", "embeddings", "norms", "dense")


def group_of_each(model: Any) -> dict[str, str]:
    """Name of every parameter -> its group.

    `router`: the gates of MoE layers and of attention experts. `experts`: the routed experts. `shared_experts`: those
    of every token. `attention_experts`: the rest of a mixer that routes. `embeddings`: embedding and head. `norms`:
    what has one dimension and no other group: norms, biases, decays. `dense`: everything else, such as attention and
    dense feed-forwards.
    """
    owners: dict[nn.Module, str] = {}
    for layer in moe_layers(model):
        owners |= dict.fromkeys((layer.gate, *layer.later_gates), "router")
        owners[layer.experts] = "experts"
        if layer.shared_experts is not None:
            owners[layer.shared_experts] = "shared_experts"
    for module in model.modules():
        gate = getattr(module, "gate", None)
        if isinstance(gate, Router) and module not in {layer.module for layer in moe_layers(model)}:
            owners |= {gate: "router", module: "attention_experts"}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            owners[module] = "embeddings"
    names = {name: owners[module] for name, module in model.named_modules() if module in owners}
    return {name: group_of(name, parameter, names) for name, parameter in model.named_parameters()}


def group_of(name: str, parameter: torch.Tensor, owners: Mapping[str, str]) -> str:
    """The group of one parameter: that of the nearest module that has one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (module := ".".join(parts[:length])) in owners:
            return owners[module]
    return "norms" if parameter.dim() < 2 else "dense"


def train_only(model: Any, *groups: str) -> dict[str, int]:
    """Freeze everything but some groups of parameters.

    Args:
        model: ours or native, of a type that `moe_layers` knows.
        groups: `router`, `experts`, `shared_experts`, `attention_experts`, `embeddings`, `norms`, `dense`; see
            `group_of_each`.

    Returns:
        Group -> how many numbers of it train now.

    Raises:
        ValueError: no group, an unknown one, or one that the model has not.
    """
    found = group_of_each(model)
    present = [group for group in GROUPS if group in found.values()]
    if not groups or set(groups) - set(present):
        wrong = sorted(set(groups) - set(present)) or "no group"
        raise ValueError(f"train_only got {wrong}; {type(model).__name__} has {present}.")
    counts = dict.fromkeys(groups, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(found[name] in groups)
        if found[name] in groups:
            counts[found[name]] += parameter.numel()
    return counts


class GroupedAdamW:
    """Learning rates per group, for `Trainer(optimizer_cls_and_kwargs=(GroupedAdamW, {...}))`.

    Trainer decays every parameter whose name does not say bias or norm, decays (`A_log`) and scales among them; here
    what has one dimension is left alone, and so is the group `router`'s bias.

    Keywords: `lr` for groups that are not named; `learning_rates`, group -> learning rate; `weight_decay`; all others
    are AdamW's.
    """

    def __call__(
        self,
        model: Any,
        lr: float = 1e-3,
        learning_rates: Mapping[str, float] | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lr, learning_rates, weight_decay)
        return torch.optim.AdamW(groups, lr=lr, **options)


def parameter_groups(
    model: Any, lr: float, learning_rates: Mapping[str, float] | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch: the parameters that train, by learning rate and by weight decay.

    Args:
        model: as in `train_only`.
        lr: of groups that are not named.
        learning_rates: group -> learning rate.
        weight_decay: for what has two dimensions or more.

    Raises:
        ValueError: unknown groups, or such that do not train.
    """
    rates = dict(learning_rates or {})
    found = group_of_each(model)
    training = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = sorted({found[name] for name, _ in training})
    if unknown := sorted(set(rates) - set(trained)):
        raise ValueError(f"learning_rates names {unknown}, of which nothing trains; the groups that do are {trained}.")
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in training:
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((found[name], decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rates.get(group, lr), "weight_decay": decay, "group": group}
        for (group, decay), parameters in groups.items()
    ]


def routers_in_fp32(model: Any) -> None:
    """Let the routers of a model in 16 bits hold their weights, and compute, in float32.

    A step of 1e-5 on a weight of 0.1 is lost in bfloat16, and logits that are rounded tie. Tokens are widened on their
    way into a router, also under autocast; combine weights come out in the model's type, logits in float32. Files that
    are saved from then on hold float32 routers; `from_pretrained(dtype=torch.bfloat16)` narrows them again. Call it
    before the optimizer is made, once.

    Args:
        model: ours or native, of a type that `moe_layers` knows.

    Raises:
        ValueError: no MoE layers.
    """
    layers = list(moe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers.")
    for gate in dict.fromkeys(gate for layer in layers for gate in (layer.gate, *layer.later_gates)):
        dtypes = {p.dtype for p in gate.parameters()} - {torch.float32}
        for parameter in gate.parameters():
            parameter.data = parameter.data.float()
        if dtypes:
            run = InFloat32(dtypes.pop())
            gate.register_forward_pre_hook(run.enter, with_kwargs=True)
            gate.register_forward_hook(run.leave, always_call=True)


class InFloat32:
    """Hooks around a router that computes in float32 in a model of another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.contexts = dtype, []

    def enter(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Widen what goes in."""
        context = torch.autocast(next(gate.parameters()).device.type, enabled=False)
        context.__enter__()
        self.contexts.append(context)
        return tuple(map(widened, args)), {name: widened(value) for name, value in kwargs.items()}

    def leave(self, gate: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Narrow the combine weights; also after an error, when there is no output."""
        self.contexts.pop().__exit__(None, None, None)
        if output is None:
            return None
        found = read_gate(gate, output)
        return replace_in(gate, output, found.logits, found.weights.to(self.dtype))


def widened(value: Any) -> Any:
    """A tensor of 16 bits in float32; anything else as it is."""
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value
