"""PST: prune a model while it is tuned, with few parameters (https://arxiv.org/abs/2205.11005).

    W' = (W + beta U V) * M,   M = 1 for the largest (1 - v) of S,   S = |W| + alpha_1 A B + alpha_2 (R 1^T + 1 C^T)

S is the magnitude plus what the data say, which is low in rank (A B) and lies in rows and columns (R, C). M's gradient
goes to S as it is (straight through). Letters: E experts, O outputs, D inputs, r rank.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from .peft_types import register
from .reweighted import SLOTS, Reweighted, ReweightedModel, most_important, straight_through
from .routed_lora import low_rank
from .targets import TargetsConfig


@dataclass
class PstConfig(TargetsConfig):
    """Options of PST; with sparsity 0, where `SparsityRamp` begins, and U = 0 the layer is what it was.

    From a second-hand account of the paper: that |W| is that of the frozen weight, and that all numbers start at 0 but
    those of A and V, is our choice. 50 to 90% sparsity at about 1.5% trained parameters are reported.

    Args:
        target_modules: linear layers and modules of stacked experts; each expert is pruned by itself.
        r: rank of U V and of A B.
        sparsity: v in the end; see `SparsityRamp`, without which nothing is pruned.
        beta: of the update; alpha_1: of A B; alpha_2: of R and C.
    """

    method: ClassVar[str] = "pst"

    r: int = field(default=8, metadata={"help": "Rank of the update and of the scores."})
    sparsity: float = field(default=0.5, metadata={"help": "Part of the weights that is 0 in the end."})
    beta: float = field(default=1.0, metadata={"help": "Factor of the update."})
    alpha_1: float = field(default=1.0, metadata={"help": "Factor of the low-rank scores."})
    alpha_2: float = field(default=1.0, metadata={"help": "Factor of the scores of rows and columns."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or not 0 <= self.sparsity < 1:
            raise ValueError(f"r={self.r} must be at least 1, sparsity={self.sparsity} at least 0 and below 1.")


class Pst(Reweighted):
    """U (..., O, r), V (..., r, D), A (..., O, r), B (..., r, D), R (..., O, 1), C (..., 1, D) of every weight."""

    adapter_layer_names = tuple(f"pst_{letter}_{slot}" for letter in "UVABRC" for slot in SLOTS)
    other_param_names = (*Reweighted.other_param_names, "pst_sparsity")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for dictionary in self.adapter_layer_names:
            setattr(self, dictionary, nn.ParameterDict())
        self.pst_sparsity = BufferDict(persistent=True)

    def make(self, adapter: str, slot: str, weight: torch.Tensor, config: Any) -> None:
        *experts, rows, columns = weight.shape
        zeros = {"U": (rows, config.r), "B": (config.r, columns), "R": (rows, 1), "C": (1, columns)}
        for letter, shape in zeros.items():
            self.of(letter, slot)[adapter] = nn.Parameter(torch.zeros(*experts, *shape))
        self.of("V", slot)[adapter] = low_rank(*experts, config.r, columns)
        self.of("A", slot)[adapter] = nn.Parameter(low_rank(*experts, config.r, rows).data.mT.contiguous())
        self.sparsity_of[adapter] = torch.zeros(1)

    @property
    def sparsity_of(self) -> Any:
        """Name of an adapter -> (1,) what part is pruned now."""
        return self.pst_sparsity

    def of(self, letter: str, slot: str) -> Any:
        """Name of an adapter -> its matrix of that letter."""
        return getattr(self, f"pst_{letter}_{slot}")

    def set_sparsity(self, part: float) -> None:
        """Prune active adapters to a part of their final sparsity."""
        for adapter in self.active_adapters:
            if adapter in self.configs:
                self.sparsity_of[adapter].fill_(part * self.configs[adapter].sparsity)

    def changed(self, adapter: str, slot: str, weight: torch.Tensor) -> torch.Tensor:
        config, (u, v, a, b, r, c) = self.configs[adapter], (self.of(letter, slot)[adapter] for letter in "UVABRC")
        new = weight + config.beta * (u @ v)
        if not (sparsity := self.sparsity_of[adapter].item()):
            return new + 0 * (a.sum() + b.sum() + r.sum() + c.sum())  # every parameter has a gradient, as DDP wants
        scores = weight.abs() + config.alpha_1 * (a @ b) + config.alpha_2 * (r + c)
        return new * straight_through(most_important(scores, 1 - sparsity), scores)


class PstModel(ReweightedModel):
    """PEFT's tuner for `PstConfig`."""

    prefix, tuner_layer_cls, layer_class = "pst_", Pst, Pst


register("pst", PstConfig, PstModel)
