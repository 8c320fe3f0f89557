"""What the parts of one forward pass share."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ForwardContext:
    """Handed to every mixer and router.

    No tuple: accelerate would look into it and move the shared modules from device to device with every layer.
    """

    shared: nn.ModuleDict | None = None  # modules that are one object over the whole depth
    token_mask: torch.Tensor | None = None  # (N,) False for padding; None if there is none
    losses: bool = False  # whether the balance losses are wanted
    segments: torch.Tensor | None = None  # (B, T) which packed sequence a token is of; None if rows are not packed


NO_CONTEXT = ForwardContext()
