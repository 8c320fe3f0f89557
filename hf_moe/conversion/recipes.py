"""Recipes: how one target tensor is made of source tensors. A plan is a dict `target name -> recipe`.

Letters: E experts, N sources.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Reader = Callable[[int, str], torch.Tensor]


@dataclass(frozen=True)
class Tensor:
    """The tensor `name` of source number `source`, as it is (the result shares its memory)."""

    source: int
    name: str


@dataclass(frozen=True)
class Mean:
    """Uniform average, summed in a wider type than the parts have; always a tensor of its own."""

    parts: tuple["Recipe", ...]


@dataclass(frozen=True)
class Concat:
    """The parts one after the other along an existing dimension."""

    parts: tuple["Recipe", ...]
    dim: int = 0


@dataclass(frozen=True)
class Stack:
    """The parts along a new first dimension; `shape` inserts further dimensions of size 1."""

    parts: tuple["Recipe", ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Normal:
    """Fresh entries from N(0, std); std 0 gives zeros."""

    shape: tuple[int, ...]
    std: float


Recipe = Tensor | Mean | Concat | Stack | Normal


def inputs(recipe: Recipe) -> Iterator[Tensor]:
    """Every source tensor that the recipe reads."""
    if isinstance(recipe, Tensor):
        yield recipe
    elif not isinstance(recipe, Normal):
        for part in recipe.parts:
            yield from inputs(part)


def run(recipe: Recipe, read: Reader, generator: torch.Generator) -> torch.Tensor:
    """The tensor that a recipe describes; `read(source, name)` gives the source tensors."""
    match recipe:
        case Tensor(source, name):
            return read(source, name)
        case Mean(parts):
            return mean([run(part, read, generator) for part in parts])
        case Concat(parts, dim):
            return torch.cat([run(part, read, generator) for part in parts], dim)
        case Stack(parts, shape):
            return torch.stack([run(part, read, generator) for part in parts]).reshape(shape)
        case Normal(shape, std):
            return torch.empty(shape).normal_(0.0, 1.0, generator=generator) * std


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Average in float64 for float32 parts, in float32 for half precision: equal parts give back exactly that part."""
    first = tensors[0]
    wide = torch.float64 if first.dtype in (torch.float32, torch.float64) else torch.float32
    total = torch.zeros_like(first, dtype=wide)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(first.dtype)


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator that depends on the seed and the tensor's name only, so that the order of work changes nothing."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
