"""Residual blocks: a token mixer and a feed-forward around the residual stream."""

from .base import Block
from .mixer_only import MixerOnly
from .own_residual import OwnResidual
from .parallel import Parallel
from .post_norm import PostNorm
from .pre_norm import PreNorm
from .sandwich import Sandwich
from .shortcut_moe import ShortcutMoe
from .widenet import Widenet

BLOCKS: dict[str, type[Block]] = {
    "pre_norm": PreNorm,
    "parallel": Parallel,
    "post_norm": PostNorm,
    "sandwich": Sandwich,
    "mixer_only": MixerOnly,
    "shortcut_moe": ShortcutMoe,
    "own_residual": OwnResidual,
    "widenet": Widenet,
}
