"""How often each expert of a model is chosen while it runs, ours or native."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .anatomy import moe_layers
from .configuration import DecoderConfig
from .router_calls import RouterCall, watched_routers


@contextmanager
def counted_choices(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Count tokens per expert in every forward pass inside the `with` block.

    Args:
        model: of a type that `moe_layers` knows.

    Yields:
        Name of the MoE layer -> (E,) counts so far in int64, experts without parameters included, behind the others.
        Slots that a router of ours leaves unused do not count.
    """
    ours = isinstance(model.config, DecoderConfig)
    counts = {
        layer.name: torch.zeros(layer.num_experts + layer.num_zero_experts, dtype=torch.long)
        for layer in moe_layers(model)
    }

    def add(call: RouterCall) -> None:
        count = counts[call.layer.name]
        indices = call.indices[call.weights != 0] if ours else call.indices
        count.add_(torch.bincount(indices.detach().reshape(-1).cpu(), minlength=len(count)))

    with watched_routers(model, add):
        yield counts
