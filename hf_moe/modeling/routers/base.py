"""What every router promises. Letters: N tokens, D width, E experts, K chosen experts per token."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch.compiler import is_compiling

from ..context import NO_CONTEXT, ForwardContext
from ..losses import BALANCE_LOSSES, expert_loads, router_z_loss
from ..ops.recomputation import is_recomputed
from ..parts import Part

MANY_CALLS = 2048  # no optimizer step accumulates so many micro-batches
NEVER_EMPTIED = (
    f"A router has counted {MANY_CALLS} batches as one optimizer step: nothing updates its selection bias, or starts "
    "the counts of the global-batch loss anew. Give Trainer hf_moe.training.BiasBalancing() or LoadBalancing()."
)


class Routing(NamedTuple):
    """Which experts see which tokens."""

    logits: torch.Tensor  # (N, E)
    weights: torch.Tensor  # (N, K) combine weights; an unused slot has weight 0
    indices: torch.Tensor  # (N, K)
    state: torch.Tensor | None = None  # what the next layer's router receives, with its gradient
    loss: torch.Tensor | None = None  # scalar: losses of the router's own, weighted by coefficients of its own
    chances: torch.Tensor | None = None  # (N, E) how probably each expert was chosen, with gradient; None: not known


class Router(Part):
    """Chooses experts: `forward(tokens (N, D), state, context) -> Routing`.

    Attributes:
        loads: (E,) fp32 assignments since the last optimizer step, over all processes; counted in training, where a
            selection bias or the global-batch loss needs them, and emptied by `hf_moe.training`.
        counted: calls that `loads` holds, compiled ones left out.
        counts_ahead: whether `loads` are those of the whole optimizer step already, and nothing is to be added.
    """

    top_k: int
    scoring: str = "softmax"  # what the scores are: the name that tools read
    normalize: bool = True  # whether the combine weights of a token sum to 1
    varies: ClassVar[bool] = False  # whether tokens differ in how many experts they use
    reads_experts: ClassVar[bool] = False  # whether it wants `context.experts`
    takes_candidates: bool = False  # whether it chooses among `context.candidates` only
    num_zero_experts: int = 0  # how many of the last experts compute nothing; the feed-forward says
    e_score_correction_bias: torch.Tensor | None  # (E,) added to the scores for the choice only

    def __init__(self, config: Any, layer_idx: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.empty_loads()
        # registered here: a class attribute of that name would hide the buffer
        self.register_buffer("e_score_correction_bias", None)

    def empty_loads(self) -> None:
        """Start counting anew."""
        self.loads: torch.Tensor | None = None
        self.counted, self.counts_ahead = 0, False

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        """Raise `ValueError` if this router, with the options in `spec`, cannot choose among so many experts."""
        top_k = spec.get("top_k", 1)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"num_experts_per_tok (a router's top_k) is {top_k}; with num_experts={num_experts} it must be 1 to "
                f"{num_experts}."
            )

    @classmethod
    def check_experts(cls, kind: str, table: Mapping[str, Any]) -> None:
        """Raise `ValueError` if this router cannot read what it wants from the experts called `kind` in `table`."""
        if cls.reads_experts and not table[kind].tells_statistics:
            valid = sorted(name for name, experts in table.items() if experts.tells_statistics)
            raise ValueError(f"This router reads its experts' weights; {kind!r} tell nothing, use one of {valid}.")

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, E) probabilities in fp32, as the selection and the balance loss read them."""
        return logits.float().softmax(-1)

    def limit_to_candidates(self, ranking: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`ranking` (N, E) with -inf for the experts that are no `context.candidates`."""
        if context.candidates is None:
            return ranking
        return ranking.masked_fill(~context.candidates.to(ranking.device), float("-inf"))

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,): balance loss (`context.balance`; 1 at perfect balance), z-loss, and the router's own, of this call."""
        balance = BALANCE_LOSSES[context.balance](
            self.scores(routing.logits),
            routing.indices,
            routing.weights,
            context,
            loads=self.loads if self.training else None,
            num_zero_experts=self.num_zero_experts,
            chances=routing.chances,
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
        if self.counts_ahead or is_recomputed():
            return
        loads = expert_loads(routing.logits.float(), routing.indices, routing.weights, context.token_mask)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        self.loads = loads if self.loads is None else self.loads + loads
        if is_compiling():  # a graph would be traced again for every number
            return
        self.counted += 1
        if self.counted == MANY_CALLS:
            warnings.warn(NEVER_EMPTIED, stacklevel=2)


def layers_routed_by(config: Any, kind: str) -> dict[int, dict[str, Any]]:
    """The feed-forward specs whose router is of that kind, by the number of their layer."""
    blocks, pattern = config.blocks, config.block_pattern
    specs = [blocks[name].get("feed_forward", {}) for name in pattern]
    layers = {layer: specs[number % len(specs)] for number, layer in enumerate(config.block_starts)}
    return {layer: spec for layer, spec in layers.items() if spec.get("router", {}).get("type") == kind}
