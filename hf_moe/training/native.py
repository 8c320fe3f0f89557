"""Counts, for Transformers' own models with a selection bias, what our routers count themselves."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..modeling import MoeLayer, moe_layers
from ..modeling.ops.recomputation import is_recomputed


class NativeLoads:
    """Assignments per expert of every MoE layer with a selection bias, since they were emptied, over all processes.

    Only forward passes in training count, without the padding that a two-dimensional `attention_mask` tells, and not
    when checkpointing repeats them.

    Args:
        model: of a family that `hf_moe.moe_layers` knows, also under the wrappers that trainers put around it.

    Raises:
        ValueError: another family, or one without selection biases.
    """

    def __init__(self, model: Any) -> None:
        self.layers = [layer for layer in moe_layers(model) if layer.selection_bias is not None]
        if not self.layers:
            raise ValueError(f"No router of {type(model).__name__} has a selection bias.")
        self.loads: dict[str, torch.Tensor] = {}
        self.token_mask: torch.Tensor | None = None
        decoder = next(m for m in model.modules() if isinstance(m, PreTrainedModel) and m.base_model is m)
        self.hooks = [decoder.register_forward_pre_hook(self.remember_mask, with_kwargs=True)]
        self.hooks += [layer.gate.register_forward_hook(partial(self.count, layer)) for layer in self.layers]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `(selection bias, loads)` of every layer that ran."""
        for layer in self.layers:
            if layer.name in self.loads and layer.selection_bias is not None:
                yield layer.selection_bias, self.loads[layer.name]

    def remember_mask(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before every forward pass."""
        mask = kwargs.get("attention_mask")
        self.token_mask = mask.flatten() != 0 if torch.is_tensor(mask) and mask.dim() == 2 else None

    @torch.no_grad()
    def count(self, layer: MoeLayer, gate: nn.Module, args: tuple, output: tuple) -> None:
        """After every call of a router, which returns logits, weights and indices."""
        if not gate.training or is_recomputed():
            return
        indices = output[2]  # (N, K)
        chosen = indices if self.token_mask is None else indices[self.token_mask.to(indices.device)]
        loads = torch.bincount(chosen.flatten(), minlength=layer.num_experts).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        self.loads[layer.name] = self.loads.get(layer.name, 0) + loads

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
