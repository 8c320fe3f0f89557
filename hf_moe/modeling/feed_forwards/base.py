"""What every second half of a block promises, dense or sparse.

`forward(hidden_states (B, T, D), router_state, context) -> (output (B, T, D), router_state, losses (3,) or None)`
"""

from typing import ClassVar

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..parts import Part

FeedForwardOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class FeedForward(Part):
    """Base class: works on each token by itself; may read and write the state that routers pass through the depth."""

    routed: ClassVar[bool] = False  # has `num_experts`, a `router` and `experts`, which the config's properties name

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        raise NotImplementedError
