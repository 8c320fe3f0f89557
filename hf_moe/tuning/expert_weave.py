"""ExpertWeave: many ESFT adapters over one base model, in one batch (https://arxiv.org/abs/2508.17624).

The trained experts of all adapters stand behind the base's in its own stacks, and a table sends the choices of a token
there:

    physical expert = Pi[adapter of the token, chosen expert];   Pi[a, e] = e where adapter a did not train e

so that one forward pass of the base's own kernel serves rows with different adapters. Letters: E experts of the base,
A adapters, N tokens, K chosen, B rows, T tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import nn

from ..modeling.router_calls import CurrentRows
from .esft import EsftConfig
from .expert_subset import FIRST, check_experts, expert_modules

BASE = "__base__"  # PEFT's name for rows without an adapter
PREFIX = "base_model.model."


class ExpertWeave:
    """Puts adapters into a model; `use` says which row of a batch gets which.

        woven = ExpertWeave(model, {"law": "esft-law", "translation": "esft-translation"})
        with woven.use(["law", "translation", "__base__"]):
            model.generate(**three_prompts)

    Outside `use` every row is the base's. Rows that generation multiplies, for beams or several samples, keep the
    adapter of their prompt. Memory grows by the trained experts only.

    Args:
        model: of a type that `moe_layers` knows; its stacks are replaced until `unload`.
        adapters: name -> folder or hub id of an `EsftConfig` adapter.

    Raises:
        ValueError: other adapters, ones that train other modules too, that do not fit the model, or none; experts
            that are quantised, spread over devices or no plain stacks.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | Path]) -> None:
        if not adapters or BASE in adapters:
            raise ValueError(f"adapters={sorted(adapters)} must name some, and {BASE!r} is the base model's name.")
        self.model, self.names = model, list(adapters)
        self.rows, self.ids = CurrentRows(), torch.zeros(1, dtype=torch.long)
        self.modules = expert_modules(model)
        found = {name: read(name, str(folder), self.modules) for name, folder in adapters.items()}
        self.handles: list[Any] = [self.rows.follow(model)]
        self.kept: list[tuple[Any, dict[str, Any]]] = []
        for name, experts in self.modules.items():
            self.weave(name, experts, found)

    @torch.no_grad()
    def weave(self, name: str, experts: Any, found: Mapping[str, Any]) -> None:
        """Put all adapters' experts behind those of one layer."""
        mine = {adapter: of for adapter, (config, tensors) in found.items() if (of := part(config, tensors, name))}
        if not mine:
            return
        number = experts.num_experts
        table = torch.arange(number).repeat(len(self.names) + 1, 1)
        stacks = {FIRST[experts.has_gate]: [], "down_proj": []}
        origin: list[int] = []
        for adapter, (chosen, first, second) in mine.items():
            table[self.names.index(adapter) + 1, chosen] = number + len(origin) + torch.arange(len(chosen))
            origin += chosen
            for stack, tensor in zip(stacks, (first, second)):
                stacks[stack].append(tensor)
        own = {stack: getattr(experts, stack) for stack in stacks}
        own |= {f"{stack}_bias": getattr(experts, f"{stack}_bias") for stack in stacks if experts.has_bias}
        self.kept.append((experts, own | {"num_experts": number}))
        for stack, parameter in own.items():
            more = [
                part.to(parameter) for part in stacks.get(stack, [parameter.data[origin]])
            ]  # biases are the base's
            joined = torch.cat([parameter.data, *more])
            setattr(experts, stack, nn.Parameter(joined, requires_grad=parameter.requires_grad))
        experts.num_experts = number + len(origin)
        table = table.to(own["down_proj"].device)
        self.handles.append(experts.register_forward_pre_hook(lambda module, args: self.remap(table, args)))

    def remap(self, table: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Choices (N, K) of the router -> physical experts (N, K)."""
        hidden, index, *others = args
        if index.dim() != 2 or len(index) != len(hidden):
            raise ValueError("ExpertWeave remaps tables of choices (tokens, K): this router gives something else.")
        ids = self.ids.to(index.device)
        if len(ids) > 1:
            shape = self.rows.context.shape
            if shape is None or shape[0] % len(ids) or shape[0] * shape[1] != len(hidden):
                raise ValueError(f"use() names {len(ids)} rows, and the batch is {shape}: give one name per row.")
            ids = ids.repeat_interleave(len(hidden) // len(ids))
        return hidden, table[ids[:, None], index], *others

    @contextmanager
    def use(self, adapters: Sequence[str]) -> Iterator[None]:
        """Serve each row of the batches within by the adapter of that name; one name alone is for all rows.

        Raises:
            ValueError: unknown names.
        """
        known = [BASE, *self.names]
        if not adapters or (unknown := sorted(set(adapters) - set(known))):
            raise ValueError(f"There is no adapter {unknown[0] if adapters else ''!r}; choose from {known}.")
        before, self.ids = self.ids, torch.tensor([known.index(name) for name in adapters])
        try:
            yield
        finally:
            self.ids = before

    def unload(self) -> Any:
        """Take the adapters out; returns the model as it was."""
        for handle in self.handles:
            handle.remove()
        for experts, own in self.kept:
            for name, value in own.items():
                setattr(experts, name, value)
        self.handles, self.kept = [], []
        return self.model


def part(config: EsftConfig, tensors: Mapping[str, torch.Tensor], name: str) -> tuple[list[int], Any, Any] | None:
    """What an adapter trained of one layer: experts, and both stacks (S, ...)."""
    if name not in config.experts:
        return None
    return config.experts[name], tensors[f"{PREFIX}{name}.esft_in"], tensors[f"{PREFIX}{name}.esft_out"]


def read(name: str, folder: str, modules: Mapping[str, nn.Module]) -> tuple[EsftConfig, dict[str, torch.Tensor]]:
    """Config and tensors of an adapter that fits a model."""
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, EsftConfig) or config.modules_to_save:
        raise ValueError(f"{name!r} ({type(config).__name__}) trains more than experts: only EsftConfig can be woven.")
    tensors = load_peft_weights(folder, device="cpu")
    for module in config.experts:
        if module not in modules:
            raise ValueError(f"{name!r} trains {module!r}, which this model has not; it has {sorted(modules)}.")
        check_experts(modules[module], module)
        base: Any = modules[module]
        if config.experts[module][-1] >= base.num_experts:
            raise ValueError(f"{name!r} trains expert {config.experts[module][-1]} of {module!r}, which has fewer.")
        if tensors[f"{PREFIX}{module}.esft_out"].shape[1:] != base.down_proj.shape[1:]:
            raise ValueError(f"{name!r} was trained on another model: the shapes of {module!r} differ.")
    return config, tensors
