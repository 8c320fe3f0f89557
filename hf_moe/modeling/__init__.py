"""The decoder and its parts. Start with `model.py`."""

from .anatomy import MoeLayer, moe_layers, moe_layers_if_any, unwrapped
from .blocks import BLOCKS
from .cache import CacheMemory, cache_memory
from .configuration import DecoderConfig
from .counting import ParameterCounts, count_parameters, parameters_of, shares_of
from .empty import empty_model, kind_of
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
from .router_calls import RouterCall, scores, watch_routers, watched_routers
from .routers import ROUTERS
