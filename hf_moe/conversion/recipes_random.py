"""Recipes that make some neurons random: noise on top of them, or fresh entries in their place.

`dim` is where a matrix has its neurons: 0 for gate and up projections, 1 for down projections.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .recipes import CHUNK, Kitchen, Neurons, Recipe


@dataclass(frozen=True)
class RandomNeurons(Neurons):
    """`count` of `width` neurons; equal keys choose equal neurons, whatever the matrix."""

    key: str
    width: int
    count: int

    def indices(self, kitchen: Kitchen) -> torch.Tensor:
        generator = kitchen.generator(self.key)
        return kitchen.once(self, lambda: torch.randperm(self.width, generator=generator)[: self.count].sort().values)


@dataclass(frozen=True)
class AddNoise(Recipe):
    """Entries of N(0, std) added to some neurons; `key` names their random stream."""

    of: Recipe
    neurons: Neurons
    dim: int
    std: float
    key: str

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        result = copy_of(self.of, kitchen)
        if kitchen.planning:
            return result
        generator = kitchen.generator(self.key)
        for rows, block in blocks(result, self.neurons.indices(kitchen), self.dim):
            old = rows[block]
            wide = torch.promote_types(old.dtype, torch.float32)
            noise = torch.empty(old.shape, dtype=wide).normal_(0.0, 1.0, generator=generator)
            rows[block] = noise.mul_(self.std).add_(old).to(old.dtype)
        return result


@dataclass(frozen=True)
class Redraw(Recipe):
    """Some neurons' entries drawn anew from a normal distribution with the mean and the standard deviation (with
    Bessel's correction) of all entries that they replace; `key` names the random stream."""

    of: Recipe
    neurons: Neurons
    dim: int
    key: str

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        result = copy_of(self.of, kitchen)
        if kitchen.planning or not self.neurons.count:
            return result
        indices, generator = self.neurons.indices(kitchen), kitchen.generator(self.key)
        mean, std = moments(result, indices, self.dim)
        for rows, block in blocks(result, indices, self.dim):
            wide = torch.promote_types(rows.dtype, torch.float32)
            fresh = torch.empty((len(block), rows.shape[1]), dtype=wide).normal_(0.0, 1.0, generator=generator)
            rows[block] = fresh.mul_(std).add_(mean).to(rows.dtype)
        return result


def copy_of(recipe: Recipe, kitchen: Kitchen) -> torch.Tensor:
    """A tensor that may be written to."""
    made = recipe.run(kitchen)
    result = torch.empty_like(made, memory_format=torch.contiguous_format)
    return result if kitchen.planning else result.copy_(made)


def blocks(tensor: torch.Tensor, neurons: torch.Tensor, dim: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A matrix with its neurons as rows (a view), and some neurons at a time."""
    rows = tensor if dim == 0 else tensor.T
    for block in neurons.split(max(CHUNK // rows.shape[1], 1)):
        yield rows, block


def moments(tensor: torch.Tensor, neurons: torch.Tensor, dim: int) -> tuple[float, float]:
    """Mean and corrected standard deviation of all entries of some neurons, in float64."""
    count = len(neurons) * tensor.shape[1 - dim]
    mean = sum(float(rows[block].double().sum()) for rows, block in blocks(tensor, neurons, dim)) / count
    squares = sum(float((rows[block].double() - mean).square().sum()) for rows, block in blocks(tensor, neurons, dim))
    return mean, (squares / max(count - 1, 1)) ** 0.5
