"""Feed-forwards: the second half of a block, dense or sparse."""

from .base import FeedForward
from .chain_of_experts import ChainOfExperts
from .memory_receiver import MemoryReceiver
from .mlp import Mlp
from .moe import Moe
from .monet import Monet
from .peer import Peer
from .pooled_moe import PooledMoe
from .routed_ffn import RoutedFfn
from .spark import Spark
from .ultra_mem import UltraMem
from .ungated_mlp import UngatedMlp

FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "chain_of_experts": ChainOfExperts,
    "memory_receiver": MemoryReceiver,
    "mlp": Mlp,
    "moe": Moe,
    "monet": Monet,
    "peer": Peer,
    "pooled_moe": PooledMoe,
    "routed_ffn": RoutedFfn,
    "spark": Spark,
    "ultra_mem": UltraMem,
    "ungated_mlp": UngatedMlp,
}
