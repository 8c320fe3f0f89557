"""Parts: modules chosen by name from a JSON spec such as `{"type": "top_k", "top_k": 2}`.

A part's constructor is its schema: positional parameters come from the parent module, keyword-only ones from the spec.
"""

from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

# Buffers that a step of 0.001 or a running mean would be lost in, were they rounded to 16 bits.
FP32_BUFFERS = (
    "e_score_correction_bias",
    "running_mean",
    "running_var",
    "gate_up_scale",
    "down_scale",
    "tucker_directions",
)


class Slot(NamedTuple):
    """A place in a part that another part fills."""

    attribute: str  # what the module calls it, e.g. "self_attn": a saved name
    table: Mapping[str, type["Part"]]


class Part(nn.Module):
    """Base class of everything that stands in a table."""

    slots: ClassVar[dict[str, Slot]] = {}  # option name -> the slot it fills
    homes: ClassVar[dict[str, str]] = {}  # option name -> path in the decoder of a slot that is filled elsewhere
    attribute: ClassVar[str | None] = None  # overrides the slot's attribute name
    tp_plan: ClassVar[dict[str, str]] = {}  # Transformers' tensor-parallel style per child; "" is the part itself
    ep_plan: ClassVar[dict[str, str]] = {}  # the same for expert parallelism
    reads_inputs: ClassVar[tuple[str, ...]] = ()  # arguments of the model call, in `context.inputs`
    carries_state: ClassVar[bool] = False  # whether it reads and writes what travels from block to block
    spans_batch: ClassVar[bool] = False  # whether, in training, the tokens of a batch decide about each other

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        """Raise `ValueError` if these options cannot work under `config`."""

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        """`tp_plan` or `ep_plan` of this part with these options."""
        return cls.ep_plan if name == "ep_plan" else cls.tp_plan

    @classmethod
    def shared_modules(cls, config: Any, **options: Any) -> dict[str, nn.Module]:
        """Modules of this part that are one object over the whole depth; the decoder owns them."""
        return {}

    def init_weights(self, std: float) -> None:
        """Initialise the parameters and buffers that this module owns itself (not its children's)."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Part":
        """Move and convert as every module does, except that `FP32_BUFFERS` are never rounded to 16 bits."""
        before = {name: self._buffers[name] for name in FP32_BUFFERS if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            converted = self._buffers[name]
            assert buffer is not None and converted is not None
            if converted.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(converted.device)
        return self


def fp32_buffers(module: nn.Module) -> set[str]:
    """Which of `FP32_BUFFERS` occur in a model: the loader must not round them either."""
    return {name.rpartition(".")[2] for name, _ in module.named_buffers()} & set(FP32_BUFFERS)


def resolve(table: Mapping[str, type[Part]], spec: dict[str, Any]) -> dict[str, Any]:
    """Check `spec` against the part it names and return it with every default written out.

    Raises:
        ValueError: unknown part or option, or a missing one; the message lists the choices.
    """
    kind = spec.get("type", "")
    if kind not in table:
        raise ValueError(f"Unknown type {kind!r}; choose from {sorted(table)}.")
    part = table[kind]
    options = {p.name: p.default for p in signature(part).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if unknown := sorted(spec.keys() - options.keys() - {"type"}):
        raise ValueError(f"{kind!r} has no option {unknown}; it has {sorted(options)}.")
    resolved = {"type": kind, **options, **spec}
    if missing := [name for name, value in resolved.items() if value is Parameter.empty]:
        raise ValueError(f"{kind!r} needs {missing}.")
    for name, slot in part.slots.items():
        if not isinstance(resolved[name], dict):
            raise ValueError(f"{kind!r} needs {name!r} to be a spec such as {{'type': {sorted(slot.table)[0]!r}}}.")
        resolved[name] = resolve(slot.table, resolved[name])
    return resolved


def build(table: Mapping[str, type[Part]], spec: dict[str, Any], *args: Any) -> Any:
    """Instantiate the part that a spec names; `args` are what its parent provides."""
    options = dict(spec)
    return table[options.pop("type")](*args, **options)


def walk(
    table: Mapping[str, type[Part]], spec: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, type[Part], dict]]:
    """Yield `(attribute path, class, options)` of the part that a resolved spec names, then of those inside it."""
    options = dict(spec)
    part = table[options.pop("type")]
    yield path, part, options
    for name, slot in part.slots.items():
        attribute = slot.table[spec[name]["type"]].attribute or slot.attribute
        home = part.homes.get(name, path)
        yield from walk(slot.table, spec[name], f"{home}.{attribute}" if home else attribute)
