"""The dense feed-forward that adds what a memory layer below has read (UltraMem, https://arxiv.org/abs/2411.12364)."""

from typing import Any

import torch

from ..context import NO_CONTEXT, ForwardContext
from .base import FeedForward, FeedForwardOutput
from .mlp import Mlp


class MemoryReceiver(FeedForward):
    """`y = FFN(x) + m`, m the output of the nearest `ultra_mem` below with `delayed=True`.

    The memory of version 1 reads the input of one layer and adds to the output of a later one, so that a device may
    look its rows up meanwhile. Its output travels as the state that goes from layer to layer.
    """

    carries_state = False  # it can only stand above an `ultra_mem`, which does
    tp_plan = {f"dense.{name}": style for name, style in Mlp.tp_plan.items()}

    def __init__(self, config: Any, layer_idx: int, *, intermediate_size: int) -> None:
        super().__init__()
        self.dense = Mlp(config, layer_idx, intermediate_size=intermediate_size)

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        check_delays(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        assert router_state is not None, "the config has checked that a memory layer stands below"
        return self.dense(hidden_states)[0] + router_state.to(hidden_states), None, None


def feed_forwards_of(config: Any) -> list[tuple[int, dict[str, Any]]]:
    """(layer, spec perhaps without its defaults) of the feed-forward of each block in order of depth."""
    blocks, pattern = config.blocks, config.block_pattern
    return [
        (layer_idx, blocks[pattern[number % len(pattern)]].get("feed_forward", {}))
        for number, layer_idx in enumerate(config.block_starts)
    ]


def layers_of(config: Any, kind: str) -> list[int]:
    """The layers whose feed-forward is of this kind."""
    return [layer_idx for layer_idx, spec in feed_forwards_of(config) if spec.get("type") == kind]


def check_delays(config: Any) -> None:
    """Every delayed `ultra_mem` needs a `memory_receiver` above it before the next memory layer, and the reverse."""
    sender = None
    for layer_idx, spec in feed_forwards_of(config):
        receives, delayed = spec.get("type") == "memory_receiver", spec.get("delayed", False)
        if receives and sender is None:
            raise ValueError(
                f"Layer {layer_idx} is a memory_receiver, but no ultra_mem with delayed=True stands below it."
            )
        if delayed and sender is not None:
            break
        sender = layer_idx if delayed else None if receives else sender
    if sender is not None:
        raise ValueError(
            f"Layer {sender} is an ultra_mem with delayed=True, but no memory_receiver follows it before the next "
            "delayed one."
        )
