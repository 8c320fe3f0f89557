"""The first rows of a router: random, zero, tied, or from what the router will really read.

Letters: E rows, N tokens, D width.
"""

from collections.abc import Hashable

import torch

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
    distinct = (distinct_rows(layout), width)
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


def distinct_rows(layout: Layout) -> int:
    """How many rows of a router may differ: one per expert, or per replica set."""
    return layout.num_experts // layout.tied


def contrast(vectors: torch.Tensor) -> torch.Tensor:
    """(E, D) what sets each vector apart: `d_i - (d_i.m) m / |m|^2` with the mean m and `d_i = v_i - m`, in float64.

    Hidden states of different texts are nearly parallel. As rows they would score every token about equally, and the
    longest would win them all. Subtracting m changes no softmax and no choice among them, all logits move together;
    leaving out its direction takes away the part `d_i.m` of the logits, which all tokens share.
    """
    vectors = vectors.double()
    mean = vectors.mean(0)
    apart = vectors - mean
    length = mean.square().sum()
    if length == 0:
        return apart
    return apart - (apart @ mean / length)[:, None] * mean


def scaled_to(std: float, rows: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """The rows times one factor, so that they begin as decided as random ones from N(0, std) would, in float64.

    The factor makes `rms_n(std_e(row_e . x_n)) = std * rms_n(|x_n|)` on the calibration tokens: what random rows give
    on average. Without tokens it gives the rows the length of random ones, `rms_e(|row_e|) = std * sqrt(D)`.

    Args:
        std: `router_std`.
        rows: (E, D), not all equal.
        tokens: (N, D) what the router reads.
    """
    rows = rows.double()
    if tokens is None:
        now, wanted = rows.square().mean().sqrt(), std
    else:
        tokens = tokens.double()
        now = (tokens @ rows.T).var(-1).mean().sqrt()
        wanted = std * tokens.square().sum(-1).mean().sqrt()
    return rows * (wanted / now)
