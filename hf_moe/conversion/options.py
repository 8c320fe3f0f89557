"""The arguments of `upcycle`: their defaults, and what contradicts itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .methods import METHODS
from .targets import TARGETS, Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTER_INITS = ("random", "zero")
DEFAULT_NUM_COPIES = 8  # Mixtral's


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `upcycle`, which explains them; None means: follow from the others."""

    target: str = "bam"
    method: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    router_init: str = "random"
    router_std: float = 0.02
    share_key_value: bool = False
    block_type: str | None = None
    seed: int = 0
    dtype: str | torch.dtype | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)


def settle(options: Options, num_sources: int) -> Settings:
    """Fill in the defaults and refuse what contradicts itself."""
    methods = TARGETS[options.target].methods
    method = options.method or (methods[0] if len(methods) == 1 else "copy" if num_sources == 1 else "btx")
    choose("method", method, METHODS)
    if method not in methods:
        raise ValueError(f"method={method!r} cannot make a {options.target!r}; choose from {list(methods)}")
    if method == "copy" and num_sources != 1:
        raise ValueError(f"method='copy' takes one source, not {num_sources}")
    if method != "copy" and num_sources < 2:
        raise ValueError(f"method={method!r} needs at least 2 sources, got {num_sources}")
    num_experts = options.num_experts
    if num_experts is None:
        num_experts = DEFAULT_NUM_COPIES if method == "copy" else num_sources
    if method != "copy" and num_experts != num_sources:
        raise ValueError(
            f"num_experts={num_experts}, but method={method!r} makes one expert of each of {num_sources} sources"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    top_k = options.top_k if options.top_k is not None else min(1 if method == "bam" else 2, num_experts)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
    choose("router_init", options.router_init, ROUTER_INITS)
    if options.router_std < 0:
        raise ValueError(f"router_std={options.router_std} must not be negative")
    if options.share_key_value and method != "bam":
        raise ValueError("share_key_value only means something to method='bam'")
    settings = Settings(
        target=options.target,
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        router_std=options.router_std if options.router_init == "random" else 0.0,
        share_key_value=options.share_key_value,
    )
    if TARGETS[options.target].always_normalizes and not settings.normalize:
        able = [name for name, target in TARGETS.items() if method in target.methods and not target.always_normalizes]
        raise ValueError(
            f"top_k=1 leaves the router of {options.target!r} no gradient, for its one gate is always 1:"
            f" use top_k=2, or one of {able}"
        )
    return settings


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
