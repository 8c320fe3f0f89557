"""The arguments of `upcycle`, the same in Python, in YAML and as flags, and what contradicts itself."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTER_INITS = {
    "random": "fresh rows from N(0, router_std)",
    "zero": "zeros: every token ties, and trains no diversity until the balance loss breaks it",
    "tied": "fresh rows, equal inside each replica set",
    "hidden": "mean hidden state that the router reads on each expert's own prompts",
    "kmeans": "centroids of the hidden states that the router reads",
    "domain": "mean embedding of each expert's own documents",
}
CALIBRATED_INITS = ("hidden", "kmeans", "domain")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `upcycle`, which explains them; None means: follow from the others.

    `method_options` are those of the chosen method, `config_overrides` further fields of the target's config.
    """

    target: str = "bam"
    method: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    granularity: int | None = None
    shared_experts: int | None = None
    layers: str | Sequence[int] = "all"
    normalize: bool | None = None
    router_init: str | None = None
    router_std: float = 0.02
    block_type: str | None = None
    data: Any = None
    seed: int = 0
    dtype: str | torch.dtype | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    config_overrides: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that no method could use."""
        if self.router_init is not None:
            choose("router_init", self.router_init, ROUTER_INITS)
        if self.router_std < 0:
            raise ValueError(f"router_std={self.router_std} must not be negative")
        if self.granularity is not None and self.granularity < 1:
            raise ValueError(f"granularity={self.granularity} must be at least 1")
        if self.shared_experts is not None and self.shared_experts < 0:
            raise ValueError(f"shared_experts={self.shared_experts} must not be negative")

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the layers that become sparse: `all`, `every-2` (the second, fourth, ...), `last-half`,
        `first-half`, or explicit numbers: "0,4,8-11" or a sequence.

        Raises:
            ValueError: no layer is meant, or one that does not exist.
        """
        if not isinstance(self.layers, str):
            chosen = sorted(set(self.layers))
        elif self.layers == "all":
            chosen = list(range(num_layers))
        elif every := re.fullmatch(r"every-([1-9]\d*)", self.layers):  # as Komatsuzaki et al.: every second one
            step = int(every[1])
            chosen = list(range(step - 1, num_layers, step))
        elif self.layers in ("last-half", "first-half"):
            half = num_layers // 2
            chosen = list(range(half, num_layers) if self.layers == "last-half" else range(half))
        elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.layers):
            ends = [part.split("-") for part in self.layers.split(",")]
            chosen = sorted({layer for end in ends for layer in range(int(end[0]), int(end[-1]) + 1)})
        else:
            raise ValueError(
                f"layers={self.layers!r} is unknown; say all, every-2, last-half, first-half or numbers like 0,4,8-11"
            )
        if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
            raise ValueError(f"layers={self.layers!r} means {chosen}; the model has layers 0 to {num_layers - 1}")
        return tuple(chosen)


def settle_dtype(asked: str | torch.dtype | None, found: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The result's type: as asked, else the one that all sources have (None where that is not known yet)."""
    if asked is not None:
        name = asked if isinstance(asked, str) else str(asked).removeprefix("torch.")
        choose("dtype", name, DTYPES)
        return DTYPES[name]
    known = {dtype for dtype in found if dtype is not None}
    if len(known) > 1:
        raise ValueError(f"the sources have different types, {sorted(map(str, known))}: pass dtype")
    return next(iter(known), None)


def choose(what: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{what}={value!r} is unknown; choose from {list(choices)}")
