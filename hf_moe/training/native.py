"""Counts, for Transformers' own models, what our routers count themselves."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..modeling import MoeLayer, RouterCall, moe_layers, watch_routers


class NativeLoads:
    """Assignments per expert of every MoE layer since they were emptied, over all processes.

    Only forward passes in training count, without the padding that a two-dimensional `attention_mask` tells, and not
    when checkpointing repeats them.

    Args:
        model: of a family that `hf_moe.moe_layers` knows, also under the wrappers that trainers put around it.

    Attributes:
        loads: name of the layer -> (E,) float32.
        counts_ahead: whether they are those of the whole optimizer step already, and nothing is to be added.

    Raises:
        ValueError: another family, or no MoE layers.
    """

    def __init__(self, model: Any) -> None:
        self.layers = list(moe_layers(model))
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no MoE layers.")
        self.empty()
        self.handles = watch_routers(model, self.count)

    def empty(self) -> None:
        """Start the next optimizer step."""
        self.loads: dict[str, torch.Tensor] = {}
        self.counts_ahead = False

    @torch.no_grad()
    def count(self, call: RouterCall) -> None:
        """After every call of a router."""
        if not call.gate.training or call.recomputed or self.counts_ahead:
            return
        mask, layer = call.token_mask, call.layer
        chosen = call.indices if mask is None else call.indices[mask]
        experts = layer.num_experts + layer.num_zero_experts
        loads = torch.bincount(chosen.flatten(), minlength=experts).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        self.loads[layer.name] = self.loads.get(layer.name, 0) + loads

    def of_biased(self) -> Iterator[tuple[MoeLayer, torch.Tensor]]:
        """Yield every layer with a selection bias that ran, and its loads."""
        for layer in self.layers:
            if layer.name in self.loads and layer.selection_bias is not None:
                yield layer, self.loads[layer.name]

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
