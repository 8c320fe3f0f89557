"""Which neurons of a dense feed-forward go where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .recipes import Kitchen, Neurons, Recipe, Scale, Take


@dataclass(frozen=True)
class Span(Neurons):
    """`count` neurons from `start` on."""

    start: int
    count: int

    def indices(self, kitchen: Kitchen) -> torch.Tensor:
        return torch.arange(self.start, self.start + self.count)


class FeedForward(NamedTuple):
    """The three matrices of a gated feed-forward `down(act(gate x) * up x)`."""

    gate: Recipe
    up: Recipe
    down: Recipe

    def scaled(self, factor: float) -> "FeedForward":
        """Its output times a factor, folded into the down projection."""
        return self if factor == 1 else self._replace(down=Scale(self.down, factor))

    def take(self, neurons: Neurons) -> "FeedForward":
        """The narrower feed-forward of some of its neurons."""
        return FeedForward(Take(self.gate, neurons, 0), Take(self.up, neurons, 0), Take(self.down, neurons, 1))


def contiguous_parts(width: int, parts: int) -> Sequence[Span]:
    """The neurons cut into equal contiguous parts; `parts` must divide `width`."""
    each = width // parts
    return [Span(part * each, each) for part in range(parts)]
