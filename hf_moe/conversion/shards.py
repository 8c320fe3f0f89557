"""Counts for methods that cut feed-forwards into shards, and what they have in common."""

from collections.abc import Sequence

from .options import Options

MOST_CHOICES = 256  # nobody wants more shards than that named


def check_cut(what: str, parts: int, width: int) -> None:
    """Refuse a number of parts into which a feed-forward cannot be cut equally."""
    if parts < 1 or width % parts:
        choices = [number for number in range(1, min(width, MOST_CHOICES) + 1) if width % number == 0]
        raise ValueError(f"{what}={parts} does not divide intermediate_size={width}; choose from {choices}")


def check_multiple(what: str, value: int, unit: int, meaning: str, most: int) -> None:
    """Refuse a count that breaks up sets of `unit`; `meaning` says what such a set is."""
    if value < 1 or value % unit:
        choices = list(range(unit, most + 1, unit))
        raise ValueError(f"{what}={value} is not a multiple of {unit}, {meaning}; choose from {choices}")


def is_zero(options: Options) -> bool:
    """Whether all router rows are zero."""
    return options.router_init == "zero" or (
        options.router_init in (None, "random", "tied") and options.router_std == 0
    )


def refuse_zero_router(options: Options, top_k: int, num_experts: int) -> None:
    """Among equal scores top-k takes any experts, rarely one of each shard."""
    if is_zero(options) and top_k < num_experts:
        how = "router_init='zero'" if options.router_init == "zero" else "router_std=0"
        raise ValueError(
            f"{how}: with equal scores top-k does not choose one of each shard, so tokens would lose some and get"
            " others twice; use router_init='tied' with a small router_std such as 1e-3"
        )


def refuse(options: Options, method: str, names: Sequence[str], instead: str) -> None:
    """Refuse general options that a method has no use for."""
    for name in names:
        if getattr(options, name):
            raise ValueError(f"{name}={getattr(options, name)} means nothing to method={method!r}; {instead}")
