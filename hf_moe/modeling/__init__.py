"""The decoder and its parts. Start with `model.py`."""

from .anatomy import MoeLayer, moe_layers
from .blocks import BLOCKS
from .cache import CacheMemory, cache_memory
from .configuration import DecoderConfig
from .counting import ParameterCounts, count_parameters
from .experts import EXPERTS
from .feed_forwards import FEED_FORWARDS
from .host import register
from .mixers import MIXERS
from .model import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
    model_classes,
)
from .parts import build, resolve, walk
from .router_calls import RouterCall, watch_routers, watched_routers
from .routers import ROUTERS
