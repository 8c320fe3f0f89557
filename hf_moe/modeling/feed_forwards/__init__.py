"""Feed-forwards: the second half of a block, dense or sparse."""

from .base import FeedForward
from .mlp import Mlp
from .moe import Moe
from .ungated_mlp import UngatedMlp

FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "mlp": Mlp,
    "moe": Moe,
    "ungated_mlp": UngatedMlp,
}
