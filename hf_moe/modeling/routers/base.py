"""What every router promises. Letters: N tokens, D width, E experts, K chosen experts per token."""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from ..context import NO_CONTEXT, ForwardContext
from ..losses import BALANCE_LOSSES, expert_loads, router_z_loss
from ..ops.recomputation import is_recomputed
from ..parts import Part


class Routing(NamedTuple):
    """Which experts see which tokens."""

    logits: torch.Tensor  # (N, E)
    weights: torch.Tensor  # (N, K) combine weights; an unused slot has weight 0
    indices: torch.Tensor  # (N, K)
    state: torch.Tensor | None = None  # what the next layer's router receives, with its gradient
    loss: torch.Tensor | None = None  # scalar: losses of the router's own, weighted by coefficients of its own


class Router(Part):
    """Chooses experts: `forward(tokens (N, D), state, context) -> Routing`.

    Attributes:
        loads: (E,) fp32 assignments since the last optimizer step, over all processes; counted in training, where a
            selection bias or the global-batch loss needs them, and emptied by `hf_moe.training`.
    """

    top_k: int
    scoring: str = "softmax"  # what the scores are: the name that tools read
    normalize: bool = True  # whether the combine weights of a token sum to 1
    varies: ClassVar[bool] = False  # whether tokens differ in how many experts they use
    reads_experts: ClassVar[bool] = False  # whether it wants `context.experts`
    num_zero_experts: int = 0  # how many of the last experts compute nothing; the feed-forward says
    e_score_correction_bias: torch.Tensor | None = None  # (E,) added to the scores for the choice only

    def __init__(self, config: Any, layer_idx: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.loads: torch.Tensor | None = None

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

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,): balance loss (`context.balance`; 1 at perfect balance), z-loss, and the router's own, of this call."""
        balance = BALANCE_LOSSES[context.balance](
            self.scores(routing.logits),
            routing.indices,
            routing.weights,
            context,
            loads=self.loads,
            num_zero_experts=self.num_zero_experts,
        )
        own = balance.new_zeros(()) if routing.loss is None else routing.loss.to(balance.dtype)
        return torch.stack([balance, router_z_loss(routing.logits, context.token_mask), own])

    def wanted_losses(self, routing: Routing, context: ForwardContext) -> torch.Tensor | None:
        """`losses` of this call without the padding, if anybody asked for them; in training it is also counted."""
        if not context.losses:
            return None
        if context.token_mask is not None:  # it is on the first layer's device
            context = replace(context, token_mask=context.token_mask.to(routing.logits.device))
        if self.training and (self.e_score_correction_bias is not None or context.balance == "global"):
            self.count(routing, context)
        return self.losses(routing, context)

    @torch.no_grad()
    def count(self, routing: Routing, context: ForwardContext) -> None:
        """Add the assignments of this call, on all processes, to `loads`."""
        if is_recomputed():
            return
        loads = expert_loads(routing.logits.float(), routing.indices, routing.weights, context.token_mask)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        self.loads = loads if self.loads is None else self.loads + loads
