"""The first rows of a router: random, zero, tied, or from what the router will really read."""

from collections.abc import Hashable

from .options import CALIBRATED_INITS
from .recipes import Concat, Constant, Finding, Normal, Recipe, Repeat
from .targets import Layout


def router_rows(init: str, std: float, layout: Layout, layer: int, width: int, key: str) -> Recipe:
    """(E + null experts, width) the router's rows in one layer.

    Args:
        init: a key of `ROUTER_INITS`. Calibrated rows are the finding `router_finding(layer)`.
        std: of random rows.
        layout: `tied` rows in a row are equal; null experts get random rows, whatever the others are.
        width: of what the router reads.
        key: names the random stream: the target tensor's name.
    """
    distinct = (layout.num_experts // layout.tied, width)
    rows: Recipe
    if init in CALIBRATED_INITS:
        rows = Finding(router_finding(layer), distinct)
    elif init == "zero":
        rows = Constant(distinct)
    else:
        rows = Normal(distinct, std, key)
    if layout.tied > 1:
        rows = Repeat(rows, layout.tied)
    if layout.num_null:
        rows = Concat((rows, Normal((layout.num_null, width), std, f"{key}:null")))
    return rows


def router_finding(layer: int) -> Hashable:
    """The key under which calibration leaves the rows of one layer's router."""
    return ("router", layer)
