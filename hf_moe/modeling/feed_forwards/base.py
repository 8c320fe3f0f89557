"""What every second half of a block promises, dense or sparse.

`forward(hidden_states (B, T, D), router_state, context) -> (output (B, T, D), router_state, losses (3,) or None)`
"""

from typing import Any, ClassVar

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..experts import EXPERTS
from ..ops.used_slots import run_used_slots
from ..parts import Part
from ..routers import ROUTERS
from ..routers.base import Router, Routing

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


def check_routing(router: dict[str, Any], experts: dict[str, Any], num_experts: int, num_choices: int) -> None:
    """Raise `ValueError` if there cannot be so many experts, or the router cannot choose, among `num_choices`."""
    ROUTERS[router["type"]].check_number(num_choices, router)
    EXPERTS[experts["type"]].check_number(num_experts, experts)
    ROUTERS[router["type"]].check_experts(experts["type"], EXPERTS)


def run_experts(gate: Router, experts: nn.Module, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
    """What the chosen experts make of the tokens, (N, D); where tokens differ in their number, without idle slots."""
    if gate.varies:
        return run_used_slots(experts, tokens, routing.indices, routing.weights, gate.num_experts)
    return experts(tokens, routing.indices, routing.weights)
