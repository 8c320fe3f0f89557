"""Routers: which experts see which tokens."""

from .base import Router, Routing
from .recurrent import Recurrent
from .soft import Soft
from .top_k import TopK

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopK,
    "soft": Soft,
    "recurrent": Recurrent,
}
