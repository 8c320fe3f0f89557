"""Drop-Upcycling: copies that each forget a part of their neurons (https://arxiv.org/abs/2502.19261, section 3.2).

The paper permutes each expert's neurons first. That changes nothing but their order, so it is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..neurons import FeedForward
from ..options import Options
from ..recipes import Recipe
from ..recipes_random import RandomNeurons, Redraw
from ..targets import Layout, Target
from .base import Exactness, Guarantee, Ingredients
from .copies import Copy

MATRICES = (("gate", 0), ("up", 0), ("down", 1))  # and the dimension in which their neurons lie


@dataclass(frozen=True, kw_only=True)
class Drop(Copy):
    """Copies in which a share of the neurons is drawn anew, from the mean and deviation of what it replaces.

    Args:
        drop_ratio: share of the neurons; 0.5 is the paper's best, 0 is plain copying.
        common_neurons: whether the three matrices lose the same neurons, as the paper says. False: each its own, as
            the released code does (`Taishi-N324/Drop-Upcycling`).
    """

    name: ClassVar[str] = "drop"
    summary: ClassVar[str] = "one dense model; copies that each forget a share of their neurons"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.19261"
    drop_ratio: float = 0.5
    common_neurons: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must be between 0 and 1")

    def experts(self, ingredients: Ingredients, layer: int) -> list[FeedForward]:
        width = ingredients.layout.expert_width
        count = int(self.drop_ratio * width)
        experts = super().experts(ingredients, layer)
        if count < 2:  # one neuron has a deviation too, but a ratio of zero must change nothing
            return experts
        return [self.forget(expert, f"{layer}:{number}", width, count) for number, expert in enumerate(experts)]

    def forget(self, expert: FeedForward, key: str, width: int, count: int) -> FeedForward:
        """One expert without some of what it knew."""
        matrices: list[Recipe] = []
        for (name, dim), matrix in zip(MATRICES, expert, strict=True):
            neurons = RandomNeurons(key if self.common_neurons else f"{key}:{name}", width, count)
            matrices.append(Redraw(matrix, neurons, dim, f"{key}:{name}:fresh"))
        return FeedForward(*matrices)

    def guarantee(self, layout: Layout, options: Options, target: Target) -> Guarantee:
        if int(self.drop_ratio * layout.expert_width) < 2:
            return super().guarantee(layout, options, target)
        return Guarantee(Exactness.NEEDS_TRAINING, f"every expert has lost {self.drop_ratio:.0%} of its neurons")
