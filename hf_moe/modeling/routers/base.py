"""What every router promises. Letters: N tokens, D width, E experts, K chosen experts per token."""

from typing import Any, NamedTuple

import torch

from ..context import NO_CONTEXT, ForwardContext
from ..losses import router_z_loss, switch_loss
from ..parts import Part


class Routing(NamedTuple):
    """Which experts see which tokens."""

    logits: torch.Tensor  # (N, E)
    weights: torch.Tensor  # (N, K) combine weights; an unused slot has weight 0
    indices: torch.Tensor  # (N, K)
    state: torch.Tensor | None = None  # what the next layer's router receives, with its gradient


class Router(Part):
    """Chooses experts: `forward(tokens (N, D), state, context) -> Routing`."""

    top_k: int
    scoring: str = "softmax"  # what the scores are: the name that tools read
    normalize: bool = True  # whether the combine weights of a token sum to 1
    carries_state: bool = False  # whether it reads and writes what travels from block to block

    def __init__(self, config: Any, layer_idx: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        """Raise `ValueError` if this router, with the options in `spec`, cannot choose among so many experts."""
        top_k = spec.get("top_k", 1)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"num_experts_per_tok (a router's top_k) is {top_k}; with num_experts={num_experts} it must be 1 to "
                f"{num_experts}."
            )

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, E) probabilities in fp32, as the selection and the balance loss read them."""
        return logits.float().softmax(-1)

    def losses(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor:
        """(2,): Switch loss (1 at perfect balance) and z-loss of this call."""
        balance = switch_loss(self.scores(routing.logits), routing.indices, routing.weights, token_mask)
        return torch.stack([balance, router_z_loss(routing.logits, token_mask)])

    def wanted_losses(self, routing: Routing, context: ForwardContext) -> torch.Tensor | None:
        """`losses` of this call without the padding, if anybody asked for them."""
        if not context.losses:
            return None
        mask = context.token_mask  # on the first layer's device
        return self.losses(routing, None if mask is None else mask.to(routing.logits.device))
