"""Virtual groups: exact fine-grained upcycling (https://arxiv.org/abs/2410.07524, section 4.2).

Every replica of the dense feed-forward is cut into G shards, and the router rows of one replica's shards are equal: a
token that chooses one shard chooses them all, and their sum is the dense feed-forward.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..dense import Dense
from ..neurons import FeedForward, contiguous_parts
from ..options import Options
from ..recipes import Scale
from ..targets import Layout, Target
from .base import DEFAULT_NUM_COPIES, Exactness, Guarantee, Ingredients, Method, common_layout

DEFAULT_GRANULARITY = 8  # the paper's E8G8T8


@dataclass(frozen=True, kw_only=True)
class VirtualGroup(Method):
    """E / G replicas of G shards; expert `e G + g` is shard g of replica e.

    With normalised gates a replica's shards have 1 / G of its weight each, so the down projections are multiplied by
    G: exact for any k that is a multiple of G. The released code multiplies all three matrices by the cube root
    instead, which is exact for squared ReLU but not for SwiGLU (specs: conversion, section 0).

    Args:
        megatron_scaling: multiply the gate, up and down projections by the cube root of G, as the released code does.
    """

    name: ClassVar[str] = "virtual_group"
    summary: ClassVar[str] = "one dense model; copies cut into shards that are chosen together"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.07524"
    megatron_scaling: bool = False

    def layout(self, options: Options, dense: Dense, num_sources: int, target: Target) -> Layout:
        shards = options.granularity or DEFAULT_GRANULARITY
        layout = common_layout(
            self,
            options,
            dense,
            target,
            num_experts=DEFAULT_NUM_COPIES * shards,
            top_k=shards,
            expert_width=dense.intermediate_size // shards,
            tied=shards,
        )
        if dense.intermediate_size % shards:
            raise ValueError(f"granularity={shards} does not divide intermediate_size={dense.intermediate_size}")
        for what, value in {"num_experts": layout.num_experts, "top_k": layout.top_k}.items():
            if value % shards:
                raise ValueError(f"{what}={value} must be a multiple of granularity={shards}")
        if options.router_init == "zero":
            raise ValueError("router_init='zero' cannot choose one of each shard; use random with a small router_std")
        if not layout.normalize:
            raise ValueError("method='virtual_group' needs normalised gates: leave normalize out")
        if options.shared_experts:
            raise ValueError(f"shared_experts={options.shared_experts}: method='virtual_group' makes none")
        return layout

    def experts(self, ingredients: Ingredients, layer: int) -> list[FeedForward]:
        layout = ingredients.layout
        parts = contiguous_parts(layout.tied * layout.expert_width, layout.tied)
        dense, factor = ingredients.feed_forward(0, layer), layout.tied / layout.gate_mass
        if self.megatron_scaling:
            dense = FeedForward(*(Scale(matrix, factor ** (1 / 3)) for matrix in dense))
        else:
            dense = dense.scaled(factor)
        return [dense.take(part) for part in parts] * (layout.num_experts // layout.tied)

    def guarantee(self, layout: Layout, options: Options, target: Target) -> Guarantee:
        if self.megatron_scaling:
            return Guarantee(Exactness.APPROXIMATE, "SwiGLU is not homogeneous: scaling its gate changes its shape")
        return Guarantee(
            Exactness.EXACT, "all shards of a replica are chosen together, and their sum is the dense feed-forward"
        )
