"""SlimMoE: all experts stay, each gets narrower, in stages with distillation between (https://arxiv.org/abs/2506.18349).

    sensitivity of neuron f of expert e = sum over batches |sum_d W_down[d, f] dL/dW_down[d, f]|

is the first-order change of L where the neuron is removed; L is the cross-entropy with the teacher's likeliest 8
tokens, which has a gradient in the first stage too, where student and teacher are the same. That the absolute value is
taken per batch is our reading. Letters: E experts, F and M inner widths of routed and shared experts, D width.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import MoeLayer, moe_layers
from ..modeling.divergence import divergence
from .own_loss import predicted


@dataclass(frozen=True)
class Neurons:
    """Where the inner neurons of one group of experts are: stacked routed ones, or a shared feed-forward.

    Args:
        name: of the module.
        down: name of the parameter that neurons write with; axis: that of its neurons, from the end.
        first: name -> axis of what neurons read with: weights and biases.
        copies: how often a neuron comes along that axis: 2 where gate and up are one weight.
        interleaved: whether they take turns there.
    """

    name: str
    down: str
    axis: int
    first: dict[str, int]
    copies: int = 1
    interleaved: bool = False

    def rows(self, kept: torch.Tensor, width: int) -> torch.Tensor:
        """(..., copies w) where the kept neurons (..., w) of `width` are along the first weight's axis."""
        if self.interleaved:
            return (kept[..., None] * self.copies + torch.arange(self.copies)).flatten(-2)
        return torch.cat([kept + copy * width for copy in range(self.copies)], -1)


def neurons_of(layer: MoeLayer, model: nn.Module) -> Iterator[Neurons]:
    """Yield the groups of a layer, routed experts first.

    Raises:
        ValueError: experts that are not stacks of plain feed-forwards.
    """
    names = {module: name for name, module in model.named_modules()}
    experts: Any = layer.experts
    name, first = names[experts], "gate_up_proj" if layer.has_gate else "up_proj"
    stacks = dict(experts.named_parameters(recurse=False))
    if not {first, "down_proj"} <= stacks.keys() or stacks["down_proj"].dim() != 3:
        raise ValueError(f"The experts {name!r} ({type(experts).__name__}) are not stacks of plain feed-forwards.")
    axes = {first: -1 if layer.transposed else -2, f"{first}_bias": -1}
    found = {f"{name}.{part}": axis for part, axis in axes.items() if part in stacks}
    axis = -2 if layer.transposed else -1
    yield Neurons(name, f"{name}.down_proj", axis, found, 2 if layer.has_gate else 1, layer.interleaved)
    shared: Any = layer.shared_experts
    if shared is not None and isinstance(getattr(shared, "down_proj", None), nn.Linear):
        name, parts = names[shared], dict(shared.named_parameters())
        reads = {f"{part}.{kind}": -2 if kind == "weight" else -1 for part in READS for kind in ("weight", "bias")}
        found = {f"{name}.{part}": axis for part, axis in reads.items() if part in parts}
        yield Neurons(name, f"{name}.down_proj.weight", -1, found)


READS = ("gate_proj", "up_proj")


def neuron_sensitivity(
    student: PreTrainedModel, teacher: Any, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """How much each inner neuron of the experts, routed and shared, matters for what the teacher predicts.

    Args:
        student: the model to slim; in the first stage the teacher itself. It is left as it was.
        teacher: the full model.
        batches: inputs of both: `input_ids`, `attention_mask` where there is padding, `labels` where not all tokens
            count. The paper does not say how many; a few hundred sequences are usual.

    Returns:
        Name of the module -> (E, F) for stacked experts, (M,) for shared ones, in float32 on the CPU.

    Raises:
        ValueError: no batches, experts that are not plain stacks.
    """
    groups = {g.name: g for layer in moe_layers(student) for g in neurons_of(layer, student)}
    parameters = {name: student.get_parameter(group.down) for name, group in groups.items()}
    kept = {name: p.requires_grad for name, p in student.named_parameters()}
    totals: dict[str, torch.Tensor] = {}
    was_training = student.training
    try:
        student.eval().requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in tqdm(batches, desc="Sensitivity of neurons", delay=5.0):
            loss = top_token_loss(student, teacher, batch)
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for (name, parameter), gradient in zip(parameters.items(), found):
                change = (parameter.detach().float() * gradient.float()).sum(-3 - groups[name].axis).abs().cpu()
                totals[name] = totals[name] + change if name in totals else change
    finally:
        student.train(was_training)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(kept[name])
    if not totals:
        raise ValueError("batches is empty: sensitivities need data.")
    return totals


def top_token_loss(student: Any, teacher: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy with the teacher's likeliest tokens, over the tokens that count."""
    device = next(student.parameters()).device
    inputs = {name: x.to(device) for name, x in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    counted = mask if "labels" not in batch else predicted({"labels": batch["labels"].to(device)}) & mask
    with torch.no_grad():
        taught = teacher(**inputs, use_cache=False).logits
    return divergence("top_cross_entropy", student(**inputs, use_cache=False).logits, taught, counted)


def slim_experts(model: PreTrainedModel, width: int, sensitivity: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model whose experts keep their `width` most sensitive neurons each; SlimMoE's pruning, one stage of it.

    Where a config gives shared experts a multiple of the routed experts' width, they shrink with them.

    Args:
        model: left as it is.
        width: new inner width of the routed experts; the paper goes from 6400 to 960 or 448, in stages.
        sensitivity: of `neuron_sensitivity`.

    Returns:
        A new model of the same class, with its own config and everything else copied.

    Raises:
        ValueError: a width that is not smaller; sensitivities of another model; a config without a number that makes
            just these experts narrower.
    """
    layers = [list(neurons_of(layer, model)) for layer in moe_layers(model)]
    missing = [group.name for groups in layers for group in groups if group.name not in sensitivity]
    widths = {sensitivity[groups[0].name].shape[-1] for groups in layers if not missing}
    if missing or len(widths) != 1 or not 1 <= width < (old := widths.pop()):
        raise ValueError(
            f"width={width} must be smaller than the experts' {sorted(widths)}, and the sensitivities those of this "
            f"model (missing: {missing[:3]})."
        )
    state = dict(model.state_dict())
    for shared in (False, True):
        groups = [group for of_layer in layers for group in (of_layer if shared else of_layer[:1])]
        slimmed = state | {n: x for group in groups for n, x in kept_part(group, state, width, old, sensitivity)}
        shapes = {name: tensor.shape for name, tensor in slimmed.items()}
        fitting = [c for c in narrower_configs(model.config, old, width) if shapes_of(type(model), c) == shapes]
        if fitting:
            made: Any = type(model)(fitting[0])
            slim = made.to(device=model.device, dtype=model.dtype)
            slim.load_state_dict(slimmed)
            return slim.train(model.training)
    raise ValueError(f"No number of {type(model.config).__name__} makes its experts {width} instead of {old} wide.")


def kept_part(
    group: Neurons, state: Mapping[str, torch.Tensor], width: int, old: int, sensitivity: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the slimmed tensors of a group; neurons stay in order."""
    scores = sensitivity[group.name]  # (E, F) or (M,)
    total = scores.shape[-1]
    kept = scores.topk(total * width // old, dim=-1).indices.sort(-1).values
    yield group.down, along(state[group.down], kept, group.axis)
    for name, axis in group.first.items():
        yield name, along(state[name], group.rows(kept, total), axis)


def along(tensor: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Choose entries of an axis, counted from the end, by an index (n,), or (E, n) with one row per expert."""
    if index.dim() == 1:
        return tensor.index_select(axis, index.to(tensor.device))
    return torch.stack([part.index_select(axis, i) for part, i in zip(tensor, index.to(tensor.device))])


def narrower_configs(config: PreTrainedConfig, old: int, new: int) -> Iterator[PreTrainedConfig]:
    """Yield copies of a config with one of the settings that are `old` set to `new`, wherever its name comes."""
    settings = config.to_dict()
    paths = [path for path, value in walk(settings) if type(value) is int and value == old]
    for ending in dict.fromkeys(path[-2:] for path in paths):
        changed = deepcopy(settings)
        for path in paths:
            if path[-2:] == ending:
                place = changed
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = new
        yield type(config).from_dict(changed)


def walk(settings: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every path into nested dictionaries, and what is there."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from walk(value, (*path, name))
        else:
            yield (*path, name), value


def shapes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shapes of what a model of a config would hold."""
    with init_empty_weights(include_buffers=True):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
