"""Routers: which experts see which tokens."""

from .base import Router, Routing
from .condition import Condition
from .decoupled import Decoupled
from .frozen import Frozen
from .grouped_top_k import GroupedTopK
from .modality import Modality
from .noisy_top_k import NoisyTopK
from .pre_gated import PreGated
from .prototype import Prototype
from .random import Random
from .recurrent import Recurrent
from .relu_norm import ReluNorm
from .soft import Soft
from .sparse_mixer import SparseMixer
from .sparsity_aware import SparsityAware
from .top_k import TopK
from .top_p import TopP
from .uncertainty import Uncertainty

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopK,
    "soft": Soft,
    "recurrent": Recurrent,
    "sparsity_aware": SparsityAware,
    "random": Random,
    "frozen": Frozen,
    "decoupled": Decoupled,
    "prototype": Prototype,
    "uncertainty": Uncertainty,
    "pre_gated": PreGated,
    "modality": Modality,
    "condition": Condition,
    "grouped_top_k": GroupedTopK,
    "top_p": TopP,
    "relu_norm": ReluNorm,
    "sparse_mixer": SparseMixer,
    "noisy_top_k": NoisyTopK,
}
