"""Chain-of-Experts: a token passes through one set of experts several times (https://arxiv.org/abs/2506.18945, §2).

    x^0 = x,   x^t = x^(t-1) + S(x^(t-1)) + sum_{e in topk(s^t)} s^t_e E_e(x^(t-1)),   s^t = softmax(W_t x^(t-1))

Letters: B batch, T time, D width, N = B T tokens, E routed experts, C iterations, S the shared experts.
"""

from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..experts import EXPERTS
from ..parts import Slot, build
from ..routers import ROUTERS, Router
from .base import FeedForward, FeedForwardOutput, check_routing, run_experts
from .mlp import Mlp


class ChainOfExperts(FeedForward):
    """C iterations over the same experts, each with a router of its own, so compute is C times that of `moe`.

    It returns the update `x^C - x^0`, which a block adds to its residual stream: with one iteration it is `moe`. The
    released code drops the un-normed stream and goes on with `x^C` itself, as the paper writes it: `include_input` in
    a block `own_residual`.

    Args:
        num_experts: routed experts E.
        router: spec of a part in `ROUTERS`; the paper's is `top_k` with `normalize=False`.
        experts: spec of a part in `EXPERTS`.
        num_iterations: C; the paper's 2.
        inner_residual: add what each iteration read to what it says. Without it, an iteration reads and the last one
            returns the experts' output alone, which the paper finds worse.
        include_input: return `x^C`, which contains x, instead of the update.
        shared_router: one router for all iterations, which the paper finds worse (`use_igate=False` in its code).
        shared_intermediate_size: width of the shared experts together, which every iteration runs; 0 for none.
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
        num_iterations: int = 2,
        inner_residual: bool = True,
        include_input: bool = False,
        shared_router: bool = False,
        shared_intermediate_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_iterations, self.inner_residual, self.include_input = num_iterations, inner_residual, include_input
        number = 1 if shared_router else num_iterations
        self.gate = nn.ModuleList(build(ROUTERS, router, config, layer_idx, num_experts) for _ in range(number))
        self.experts_attribute = EXPERTS[experts["type"]].attribute
        self.add_module(self.experts_attribute, build(EXPERTS, experts, config, layer_idx, num_experts))
        width = shared_intermediate_size
        self.shared_expert = Mlp(config, layer_idx, intermediate_size=width) if width else None

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        return super().plan(name, **options) if options["shared_intermediate_size"] else {}

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        check_routing(options["router"], options["experts"], options["num_experts"], options["num_experts"])
        if options["num_iterations"] < 1:
            raise ValueError(f"num_iterations={options['num_iterations']} must be at least 1.")
        if options["include_input"] and not options["inner_residual"]:
            raise ValueError("include_input=True has no effect with inner_residual=False; drop one of them.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        read, update, losses = hidden_states, hidden_states.new_zeros(()), []
        for iteration in range(self.num_iterations):
            gate: Any = self.gate[iteration % len(self.gate)]
            output, router_state, loss = self.iterate(gate, read, router_state, context)
            update = update + output if self.inner_residual and iteration else output
            read = read + output if self.inner_residual else output
            losses += [] if loss is None else [loss]
        return read if self.include_input else update, router_state, torch.stack(losses).sum(0) if losses else None

    def iterate(
        self, gate: Router, hidden_states: torch.Tensor, router_state: torch.Tensor | None, context: ForwardContext
    ) -> FeedForwardOutput:
        """One iteration: what the shared and the chosen experts say, the router's state and its losses."""
        tokens, experts = hidden_states.flatten(0, -2), getattr(self, self.experts_attribute)  # (N, D)
        routing = gate(tokens, router_state, context.with_experts(experts) if gate.reads_experts else context)
        output = run_experts(gate, experts, tokens, routing).view_as(hidden_states)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)[0]
        return output, router_state if routing.state is None else routing.state, gate.wanted_losses(routing, context)
