"""Recipes: how one target tensor is made of source tensors. A plan is a dict `target name -> recipe`.

Every recipe also runs on meta tensors, which tells the shape and type of its result before anything is read.

Letters: E experts, N sources.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch

Reader = Callable[[int, str], torch.Tensor]
CHUNK = 1 << 22  # entries that a wide intermediate result may have at a time


@dataclass
class Kitchen:
    """What recipes work with.

    Args:
        read: `(number of the source, name) -> tensor`; on the meta device it tells shape and type only.
        seed: of everything random.
        dtype: of tensors that no source has, such as routers.
        device: `meta` to plan, `cpu` to work.
        findings: what a calibration run found out, by its own keys.
    """

    read: Reader
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    findings: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def planning(self) -> bool:
        """Whether only shapes and types are wanted."""
        return self.device == "meta"

    def generator(self, key: str) -> torch.Generator:
        """A generator that depends on the seed and the key only, so that the order of work changes nothing."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def once(self, key: Hashable, compute: Callable[[], Any], keep: int = 64) -> Any:
        """The result of `compute`, which several recipes ask for; the last `keep` results are remembered."""
        if key not in self._kept:
            self._kept[key] = compute()
            while len(self._kept) > keep:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]


class Neurons(ABC):
    """Some hidden neurons of a feed-forward: rows of its gate and up projections, columns of its down projection."""

    count: int

    @abstractmethod
    def indices(self, kitchen: Kitchen) -> torch.Tensor:
        """(count,) their numbers, an int64 tensor; never called while planning."""

    def inputs(self) -> Iterator["Tensor"]:
        """The source tensors that the choice depends on."""
        yield from ()


class Recipe(ABC):
    """One way to make a tensor. Subclasses are frozen dataclasses; recipes among their fields are made first."""

    def parts(self) -> Iterator["Recipe"]:
        """The recipes that this one is made of."""
        for each in fields(self):  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
            value = getattr(self, each.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Recipe):
                    yield part

    def inputs(self) -> Iterator["Tensor"]:
        """Every source tensor that the recipe reads."""
        for part in self.parts():
            yield from part.inputs()
        for each in fields(self):  # pyright: ignore[reportArgumentType]
            if isinstance(value := getattr(self, each.name), Neurons):
                yield from value.inputs()

    def rounds(self) -> bool:
        """Whether entries of 16 bits are rounded on the way, so that the result computes something slightly else."""
        return any(part.rounds() for part in self.parts())

    @abstractmethod
    def run(self, kitchen: Kitchen) -> torch.Tensor:
        """The tensor; it may share memory with a source."""


@dataclass(frozen=True)
class Tensor(Recipe):
    """The tensor `name` of source number `source`, as it is."""

    source: int
    name: str

    def inputs(self) -> Iterator["Tensor"]:
        yield self

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return kitchen.read(self.source, self.name)


@dataclass(frozen=True)
class Mean(Recipe):
    """Uniform average, summed in a wider type than the parts have: equal parts give back exactly that part."""

    of: tuple[Recipe, ...]

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        tensors = [part.run(kitchen) for part in self.of]
        result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        wide = torch.float64 if result.dtype in (torch.float32, torch.float64) else torch.float32
        if kitchen.planning:
            return result
        flat = [tensor.reshape(-1) for tensor in tensors]
        for start in range(0, result.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            total = sum(tensor[piece].to(wide) for tensor in flat)
            result.view(-1)[piece] = (total / len(flat)).to(result.dtype)  # pyright: ignore
        return result

    def rounds(self) -> bool:
        return len(self.of) > 1 or super().rounds()


@dataclass(frozen=True)
class Concat(Recipe):
    """The parts one after the other along an existing dimension."""

    of: tuple[Recipe, ...]
    dim: int = 0

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return torch.cat([part.run(kitchen) for part in self.of], self.dim)


@dataclass(frozen=True)
class Stack(Recipe):
    """The parts along a new first dimension; `shape` inserts further dimensions of size 1."""

    of: tuple[Recipe, ...]
    shape: tuple[int, ...]

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return torch.stack([part.run(kitchen) for part in self.of]).reshape(self.shape)


@dataclass(frozen=True)
class Narrow(Recipe):
    """`length` rows (or columns) from `start` on: one matrix out of several that are stored as one."""

    of: Recipe
    dim: int
    start: int
    length: int

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return self.of.run(kitchen).narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class Take(Recipe):
    """The rows (dim 0) or columns (dim 1) that belong to some neurons."""

    of: Recipe
    neurons: Neurons
    dim: int

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        whole = self.of.run(kitchen)
        if kitchen.planning:
            return whole.narrow(self.dim, 0, 1).repeat_interleave(self.neurons.count, self.dim)
        return whole.index_select(self.dim, self.neurons.indices(kitchen))


@dataclass(frozen=True)
class Scale(Recipe):
    """Every entry times a factor, in float32 at least."""

    of: Recipe
    factor: float

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        tensor = self.of.run(kitchen)
        if self.factor == 1:
            return tensor
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if kitchen.planning:
            return result
        wide = torch.promote_types(tensor.dtype, torch.float32)
        flat = tensor.reshape(-1)
        for start in range(0, result.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            result.view(-1)[piece] = (flat[piece].to(wide) * self.factor).to(result.dtype)
        return result

    def rounds(self) -> bool:
        return (self.factor != 0 and abs(math.frexp(self.factor)[0]) != 0.5) or super().rounds()


@dataclass(frozen=True)
class Repeat(Recipe):
    """Every row `times` times in a row."""

    of: Recipe
    times: int

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return self.of.run(kitchen).repeat_interleave(self.times, 0)


@dataclass(frozen=True)
class Normal(Recipe):
    """Fresh entries from N(0, std); std 0 gives zeros. `key` names the random stream, usually the target tensor."""

    shape: tuple[int, ...]
    std: float
    key: str

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        if kitchen.planning or self.std == 0:
            return torch.zeros(self.shape, dtype=kitchen.dtype, device=kitchen.device)
        fresh = torch.empty(self.shape).normal_(0.0, 1.0, generator=kitchen.generator(self.key))
        return (fresh * self.std).to(kitchen.dtype)


@dataclass(frozen=True)
class Constant(Recipe):
    """The same entry everywhere; `dtype` None means that of the fresh tensors."""

    shape: tuple[int, ...]
    value: float = 0.0
    dtype: torch.dtype | None = None

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        return torch.full(self.shape, self.value, dtype=self.dtype or kitchen.dtype, device=kitchen.device)


@dataclass(frozen=True)
class Finding(Recipe):
    """Some rows of what a calibration run found out, such as router rows from hidden states."""

    key: Hashable
    shape: tuple[int, ...]

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        if kitchen.planning:
            return torch.empty(self.shape, dtype=kitchen.dtype, device="meta")
        return kitchen.findings[self.key].to(kitchen.dtype).reshape(self.shape)
