"""Routed experts, beside shared ones that every token passes through.

Letters: B batch, T time, D width, N = B T tokens, E routed experts, Z experts that compute nothing, S shared experts.
"""

from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..experts import EXPERTS
from ..ops.used_slots import run_used_slots
from ..parts import Slot, build
from ..routers import ROUTERS
from ..routers.base import Router, Routing
from .base import FeedForward, FeedForwardOutput, check_routing, run_experts
from .mlp import Mlp

ZERO_EXPERTS = ("identity", "null")


class Moe(FeedForward):
    """Routed experts, optionally beside shared experts that every token passes through (Qwen2-MoE, DeepSeekMoE).

    Args:
        num_experts: routed experts E.
        router: spec of a part in `ROUTERS`.
        experts: spec of a part in `EXPERTS`.
        shared_intermediate_size: width of one shared expert; 0 for none.
        num_shared_experts: shared experts S. They are stored as one wide feed-forward, which is their sum.
        shared_gate: multiply each shared expert by `sigmoid(w_s x)`, as Qwen2-MoE does with its only one.
        num_zero_experts: Z experts without parameters, which the router may choose too: a token's compute then depends
            on the token. They cost no matrix product. Their indices follow those of the routed experts.
        zero_expert_type: what they return: `identity` the token itself (LongCat-Flash,
            https://arxiv.org/abs/2509.01322, §2.1), `null` nothing (AdaMoE, https://arxiv.org/abs/2406.13233; its
            renormalisation over the true experts is `renormalize_true_experts`).
        renormalize_true_experts: divide the weights of a token's true experts by their sum (AdaMoE).
    """

    slots = {"router": Slot("gate", ROUTERS), "experts": Slot("experts", EXPERTS)}
    routed = True
    tp_plan = {f"shared_expert.{name}": style for name, style in Mlp.tp_plan.items()}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_experts: int,
        router: dict[str, Any],
        experts: dict[str, Any],
        shared_intermediate_size: int = 0,
        num_shared_experts: int = 1,
        shared_gate: bool = False,
        num_zero_experts: int = 0,
        zero_expert_type: str = "identity",
        renormalize_true_experts: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_zero_experts = num_experts, num_zero_experts
        self.zero_expert_type, self.renormalize_true_experts = zero_expert_type, renormalize_true_experts
        self.gate = build(ROUTERS, router, config, layer_idx, num_experts + num_zero_experts)
        self.gate.num_zero_experts = num_zero_experts  # balance losses and controllers ask for it
        self.experts_attribute = EXPERTS[experts["type"]].attribute
        self.add_module(self.experts_attribute, build(EXPERTS, experts, config, layer_idx, num_experts))
        self.num_shared_experts = num_shared_experts
        self.shared_expert = self.shared_expert_gate = None
        if shared_intermediate_size:
            width = num_shared_experts * shared_intermediate_size
            self.shared_expert = Mlp(config, layer_idx, intermediate_size=width)
            self.shared_expert_gate = (
                nn.Linear(config.hidden_size, num_shared_experts, bias=False) if shared_gate else None
            )

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        several_gates = options["shared_gate"] and options["num_shared_experts"] > 1  # they scale inside the shards
        return super().plan(name, **options) if options["shared_intermediate_size"] and not several_gates else {}

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        router, experts, zero = options["router"], options["experts"], options["num_zero_experts"]
        check_routing(router, experts, options["num_experts"], options["num_experts"] + zero)
        if options["shared_gate"] and not options["shared_intermediate_size"]:
            raise ValueError("shared_gate=True needs a shared expert: set shared_intermediate_size.")
        if options["num_shared_experts"] < 1 or zero < 0:
            raise ValueError(
                "num_shared_experts must be at least 1 (for no shared expert: shared_intermediate_size=0), "
                "num_zero_experts at least 0."
            )
        if options["renormalize_true_experts"] and not zero:
            raise ValueError("renormalize_true_experts=True has no effect without num_zero_experts; drop it.")
        if options["zero_expert_type"] not in ZERO_EXPERTS:
            raise ValueError(
                f"zero_expert_type={options['zero_expert_type']!r} is unknown; choose from {list(ZERO_EXPERTS)}."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        experts = getattr(self, self.experts_attribute)
        routing = self.gate(
            tokens, router_state, context.with_experts(experts) if self.gate.reads_experts else context
        )
        run = self.run_true_experts if self.num_zero_experts else run_experts
        output = run(self.gate, experts, tokens, routing).view_as(hidden_states)
        if self.shared_expert is not None:
            output = output + self.run_shared_experts(hidden_states)
        # a router without a state of its own hands on what it received
        state = router_state if routing.state is None else routing.state
        return output, state, self.gate.wanted_losses(routing, context)

    def run_true_experts(
        self, gate: Router, experts: nn.Module, tokens: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        """`run_experts` of a routing with zero experts, and what those return."""
        is_true = routing.indices < self.num_experts  # (N, K)
        weights = routing.weights.where(is_true, 0)
        if self.renormalize_true_experts:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        output = run_used_slots(experts, tokens, routing.indices, weights, self.num_experts)
        if self.zero_expert_type == "identity":
            kept = routing.weights.where(~is_true, 0).sum(-1, keepdim=True)
            output = output + tokens * kept.to(tokens.dtype)
        return output

    def run_shared_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) sum of the shared experts, each behind its gate."""
        assert self.shared_expert is not None
        if self.shared_expert_gate is None:
            return self.shared_expert(hidden_states)[0]
        gates = self.shared_expert_gate(hidden_states).sigmoid()  # (B, T, S)
        if self.num_shared_experts == 1:  # behind the last matrix, so that it can be sharded
            return gates * self.shared_expert(hidden_states)[0]
        hidden = self.shared_expert.activations(hidden_states).unflatten(-1, (self.num_shared_experts, -1))
        return self.shared_expert.down_proj((hidden * gates[..., None]).flatten(-2))
