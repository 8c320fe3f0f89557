"""What the parts of one forward pass share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ForwardContext:
    """Handed to every mixer, feed-forward and router.

    No tuple: accelerate would look into it and move the shared modules from device to device with every layer.
    """

    shared: nn.ModuleDict | None = None  # modules that are one object over the whole depth
    token_mask: torch.Tensor | None = None  # (N,) False for padding; None if there is none
    losses: bool = False  # whether the balance losses are wanted
    segments: torch.Tensor | None = None  # (B, T) which packed sequence a token is of; None if rows are not packed
    shape: tuple[int, int] | None = None  # (B, T): the N tokens are B rows of T
    balance: str = "switch"  # which of `losses.BALANCE_LOSSES` the routers report
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what else the model was called with
    experts: nn.Module | None = None  # the experts to choose from, for a router that `reads_experts`
    candidates: torch.Tensor | None = None  # (E,) which experts a router that `takes_candidates` may choose; None: all

    def with_experts(self, experts: nn.Module) -> "ForwardContext":
        """The same context for a router that reads the weights of its experts."""
        return replace(self, experts=experts)

    def sequence_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N,) the sequence that each of the tokens (N, ...) is of: the number of the token with which it starts."""
        batch, time = self.shape or (1, tokens.shape[0])
        columns = torch.arange(batch * time, device=tokens.device).view(batch, time)
        if self.segments is None:
            return columns[:, :1].expand(batch, time).flatten()
        starts = torch.ones_like(columns, dtype=torch.bool)
        starts[:, 1:] = self.segments.to(tokens.device).diff(dim=1) != 0
        return columns.where(starts, 0).cummax(1).values.flatten()


NO_CONTEXT = ForwardContext()
