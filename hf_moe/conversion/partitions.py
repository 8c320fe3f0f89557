"""Partitions of a feed-forward's neurons into equal parts, each neuron in exactly one.

Letters: F neurons, E parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from .clustering import balanced_kmeans
from .recipes import Kitchen, Neurons, Recipe, Tensor


@dataclass(frozen=True)
class Partition(ABC):
    """`num_parts` parts of equal size of `width` neurons; the first must divide the second."""

    width: int
    num_parts: int

    def inputs(self) -> Iterator[Tensor]:
        """The source tensors that the choice depends on."""
        yield from ()

    @abstractmethod
    def parts(self, kitchen: Kitchen) -> torch.Tensor:
        """(E, F / E) the neurons of each part."""


@dataclass(frozen=True)
class PartOf(Neurons):
    """One part of a partition, which is found once for all its parts and matrices."""

    partition: Partition
    part: int

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.partition.width // self.partition.num_parts

    def inputs(self) -> Iterator[Tensor]:
        yield from self.partition.inputs()

    def indices(self, kitchen: Kitchen) -> torch.Tensor:
        return kitchen.once(self.partition, lambda: self.partition.parts(kitchen))[self.part]


@dataclass(frozen=True)
class RandomParts(Partition):
    """A random permutation, cut; `key` names the random stream."""

    key: str

    def parts(self, kitchen: Kitchen) -> torch.Tensor:
        permutation = torch.randperm(self.width, generator=kitchen.generator(self.key))
        return permutation.view(self.num_parts, -1).sort(1).values


@dataclass(frozen=True)
class KMeansParts(Partition):
    """Balanced k-means clusters of the neurons' rows in a matrix (F, D), which are divided by their L2 norms."""

    matrix: Recipe
    key: str

    def inputs(self) -> Iterator[Tensor]:
        yield from self.matrix.inputs()

    def parts(self, kitchen: Kitchen) -> torch.Tensor:
        rows = normalize(self.matrix.run(kitchen).float(), dim=1)
        return balanced_kmeans(rows, self.num_parts, kitchen.generator(self.key))


@dataclass(frozen=True)
class FoundParts(Partition):
    """What a calibration run left under `key`, (E, F / E)."""

    key: Hashable

    def parts(self, kitchen: Kitchen) -> torch.Tensor:
        return kitchen.findings[self.key]
