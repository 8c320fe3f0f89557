"""ReXMoE: r layers route to one pool of their experts (https://arxiv.org/abs/2510.17483).

Each layer brings N experts and has its own router over the r N of its pool. Progressive scaling routing (eq. 6) lets
the candidates grow during training: `N_t = floor((1 + (r - 1) (t - t_s) / (t_e - t_s)) N)` of them between the steps
t_s and t_e, N before, r N after. There is no released code; where the text leaves a choice, an option says so.
Letters: B batch, T time, D width, N experts of a layer (and tokens in shapes), r layers of a pool, K chosen per token.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..experts import EXPERTS
from ..parts import Slot, build
from ..routers import ROUTERS
from .base import FeedForward, FeedForwardOutput, check_routing, run_experts
from .expert_pool import ExpertPool, build_pools, pools
from .mlp import Mlp

MASKINGS = ("random", "own_first")


class PooledMoe(FeedForward):
    """Routed experts that r consecutive layers of this kind share, behind a router of each layer's own.

    Args:
        num_experts: experts N that each layer brings; its router chooses among r N.
        router: spec of a part in `ROUTERS`.
        experts: spec of a part in `EXPERTS`.
        layers_per_pool: r; 1 is `moe`. The paper's best are 2 and 4.
        masking: which experts are no candidates while `num_candidates` is set: `random` ones, drawn anew by each
            forward pass in training (eq. 6; evaluation then sees all), or all but the first in the order that starts
            with the layer's own (`own_first`, in evaluation too).
        mask_before_softmax: let the probabilities of the candidates sum to 1. Eq. 6 zeroes those of the others after
            the softmax. No difference for a router that normalizes.
        shared_intermediate_size: width of this layer's own shared experts together; 0 for none.
    """

    slots = {"router": Slot("gate", ROUTERS), "experts": Slot("experts", EXPERTS)}
    homes = {"experts": "shared.pools.*.mlp"}
    routed = True
    spans_batch = True  # one draw of candidates for all tokens
    tp_plan = {f"shared_expert.{name}": style for name, style in Mlp.tp_plan.items()}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_experts: int,
        router: dict[str, Any],
        experts: dict[str, Any],
        layers_per_pool: int = 2,
        masking: str = "random",
        mask_before_softmax: bool = False,
        shared_intermediate_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts, self.masking, self.mask_before_softmax = num_experts, masking, mask_before_softmax
        groups = pools(config, layers_per_pool)
        self.pool = next(number for number, layers in enumerate(groups) if layer_idx in layers)
        self.first_own = num_experts * groups[self.pool].index(layer_idx)
        self.candidate_count: torch.Tensor | None = None
        self.gate = build(ROUTERS, router, config, layer_idx, layers_per_pool * num_experts)
        self.experts_attribute = EXPERTS[experts["type"]].attribute
        width = shared_intermediate_size
        self.shared_expert = Mlp(config, layer_idx, intermediate_size=width) if width else None

    @classmethod
    def shared_modules(
        cls, config: Any, *, num_experts: int, experts: dict[str, Any], layers_per_pool: int, **options: Any
    ) -> dict[str, nn.Module]:
        return {"pools": build_pools(config, layers_per_pool, num_experts, experts)}

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        return super().plan(name, **options) if options["shared_intermediate_size"] else {}

    @classmethod
    def check(cls, config: Any, *, layers_per_pool: int, router: dict[str, Any], **options: Any) -> None:
        number = len(pools(config, 1))
        if layers_per_pool < 1 or number % layers_per_pool:
            valid = [r for r in range(1, number + 1) if number % r == 0]
            raise ValueError(
                f"layers_per_pool={layers_per_pool} does not divide {number} layers of pooled_moe; use one of {valid}."
            )
        pooled = layers_per_pool * options["num_experts"]
        check_routing(router, options["experts"], pooled, pooled)
        if options["masking"] not in MASKINGS:
            raise ValueError(f"masking={options['masking']!r} is unknown; choose from {list(MASKINGS)}.")
        if options["mask_before_softmax"] and (router.get("scoring") != "softmax" or router.get("normalize", True)):
            raise ValueError(
                "mask_before_softmax=True has an effect only with a router {'type': 'top_k', 'scoring': 'softmax', "
                "'normalize': False}; drop it."
            )

    @property
    def num_candidates(self) -> int | None:
        """How many of the pool's experts the router may choose from; None for all. A training schedule sets it."""
        return None if self.candidate_count is None else int(self.candidate_count)

    @num_candidates.setter
    def num_candidates(self, number: int | None) -> None:
        most = self.gate.num_experts
        if number not in (None, most) and not self.gate.takes_candidates:
            raise ValueError("This router cannot leave experts out; use {'type': 'top_k'} without groups.")
        if number is not None and not self.gate.top_k <= number <= most:
            raise ValueError(f"num_candidates={number} must be {self.gate.top_k} (top_k) to {most} (the whole pool).")
        # a tensor: a compiled graph would be traced again for every new number
        self.candidate_count = None if number in (None, most) else torch.tensor(number)

    def expert_pool(self, shared: Any) -> ExpertPool:
        """This layer's pool among what the decoder shares."""
        return shared["pools"][self.pool]["mlp"]

    def candidates(self, device: torch.device) -> torch.Tensor | None:
        """(r N,) which experts the router may choose in this pass; None for all."""
        if self.candidate_count is None or (self.masking == "random" and not self.training):
            return None
        number = self.gate.num_experts
        ranks = (torch.arange(number, device=device) - self.first_own) % number
        if self.masking == "random":
            ranks = torch.rand(number, device=device).argsort()
        return ranks < self.candidate_count.to(device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        experts = getattr(self.expert_pool(context.shared), self.experts_attribute)
        candidates = self.candidates(tokens.device)
        own = replace(context, candidates=candidates, experts=experts if self.gate.reads_experts else None)
        routing = self.gate(tokens, router_state, own)
        if candidates is not None and self.mask_before_softmax:
            kept = (self.gate.scores(routing.logits) * candidates).sum(-1, keepdim=True)
            routing = routing._replace(weights=(routing.weights / kept).to(routing.weights.dtype))
        # the pool may be on another device
        output = run_experts(self.gate, experts, tokens, routing).to(tokens.device).view_as(hidden_states)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)[0]
        state = router_state if routing.state is None else routing.state
        return output, state, self.gate.wanted_losses(routing, context)
