"""Copies with noise on some neurons: the baseline of Drop-Upcycling (https://arxiv.org/abs/2502.19261)."""

from dataclasses import dataclass
from typing import ClassVar

from ..neurons import FeedForward
from ..options import Options
from ..recipes import Recipe
from ..recipes_random import AddNoise, RandomNeurons
from ..targets import Layout, Target
from .base import Exactness, Guarantee, Ingredients
from .copies import Copy


@dataclass(frozen=True, kw_only=True)
class Noise(Copy):
    """Copies with Gaussian noise on a random set of neurons in each, the same set in its three matrices.

    Args:
        noise_std: of the noise, in the units of the weights.
        noise_fraction: of the neurons, rounded down.
    """

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "one dense model; its feed-forward copied, with noise on half of each copy's neurons"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.19261"
    noise_std: float = 0.02
    noise_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.noise_std < 0:
            raise ValueError(f"noise_std={self.noise_std} must not be negative")
        if not 0 <= self.noise_fraction <= 1:
            raise ValueError(f"noise_fraction={self.noise_fraction} must be between 0 and 1")

    def experts(self, ingredients: Ingredients, layer: int) -> list[FeedForward]:
        width, layout = ingredients.dense.intermediate_size, ingredients.layout
        scale, dense = self.share(layout) / layout.gate_mass, ingredients.feed_forward(0, layer)
        found = []
        for expert in range(layout.num_experts):
            key = f"noise:{layer}:{expert}"
            neurons = RandomNeurons(key, width, int(self.noise_fraction * width))

            def noisy(matrix: Recipe, name: str, neurons: RandomNeurons = neurons, key: str = key) -> Recipe:
                return AddNoise(matrix, neurons, 1 if name == "down" else 0, self.noise_std, f"{key}:{name}")

            found.append(FeedForward(*map(noisy, dense, FeedForward._fields)).scaled(scale))
        return found

    def guarantee(self, layout: Layout, options: Options, target: Target) -> Guarantee:
        if not self.noise_std or not self.noise_fraction:
            return super().guarantee(layout, options, target)
        reason = f"noise of {self.noise_std} on {self.noise_fraction:.0%} of every expert's neurons"
        return Guarantee(Exactness.APPROXIMATE, reason)
