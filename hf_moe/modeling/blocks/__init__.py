"""Residual blocks: a token mixer and a feed-forward around the residual stream."""

from .base import Block
from .mixer_only import MixerOnly
from .parallel import Parallel
from .pre_norm import PreNorm

BLOCKS: dict[str, type[Block]] = {
    "pre_norm": PreNorm,
    "parallel": Parallel,
    "mixer_only": MixerOnly,
}
