"""The second half of a block, dense or sparse.

`forward(hidden_states (B, T, D), router_state, context) -> (output (B, T, D), router_state, losses (2,) or None)`
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .context import NO_CONTEXT, ForwardContext
from .experts import EXPERTS
from .parts import Part, Slot, build
from .routers import ROUTERS

FeedForwardOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class FeedForward(Part):
    """Base class: works on each token by itself; may read and write the state that routers pass through the depth."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        raise NotImplementedError


class Mlp(FeedForward):
    """Dense SwiGLU, as in Llama: `W_down (act(W_gate x) * W_up x)`. A router state passes through untouched."""

    tp_plan = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}

    def __init__(self, config: Any, layer_idx: int, *, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        hidden = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(hidden), router_state, None


class UngatedMlp(FeedForward):
    """Dense and without a gate: `W_down act(W_up x)`. A router state passes through untouched.

    Args:
        intermediate_size: width between the two layers.
        activation: a key of Transformers' `ACT2FN`; `relu2` is Primer's squared ReLU (PLM, Nemotron).
        bias: biases on both layers.
    """

    tp_plan = {"up_proj": "colwise", "down_proj": "rowwise"}

    def __init__(
        self, config: Any, layer_idx: int, *, intermediate_size: int, activation: str = "relu2", bias: bool = False
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[activation]

    @classmethod
    def check(cls, config: Any, *, activation: str, **options: Any) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states))), router_state, None


class SparseMoe(FeedForward):
    """Routed experts, optionally beside a shared expert that every token passes through (Qwen2-MoE, DeepSeekMoE).

    Args:
        num_experts: routed experts E.
        router: spec of a part in `ROUTERS`.
        experts: spec of a part in `EXPERTS`.
        shared_intermediate_size: width of the shared expert; 0 for none.
        shared_gate: multiply the shared expert by `sigmoid(w x)`, as Qwen2-MoE does.
    """

    slots = {"router": Slot("gate", ROUTERS), "experts": Slot("experts", EXPERTS)}
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
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        self.gate = build(ROUTERS, router, config, layer_idx, num_experts)
        self.experts_attribute = EXPERTS[experts["type"]].attribute
        self.add_module(self.experts_attribute, build(EXPERTS, experts, config, layer_idx, num_experts))
        self.shared_expert = self.shared_expert_gate = None
        if shared_intermediate_size:
            self.shared_expert = Mlp(config, layer_idx, intermediate_size=shared_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if shared_gate else None

    @classmethod
    def plan(cls, name: str, **options: Any) -> dict[str, str]:
        return super().plan(name, **options) if options["shared_intermediate_size"] else {}

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        router, experts = options["router"], options["experts"]
        ROUTERS[router["type"]].check_number(options["num_experts"], router)
        EXPERTS[experts["type"]].check_number(options["num_experts"], experts)
        if options["shared_gate"] and not options["shared_intermediate_size"]:
            raise ValueError("shared_gate=True needs a shared expert: set shared_intermediate_size.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        routing = self.gate(tokens, router_state, context)
        experts = getattr(self, self.experts_attribute)
        output = experts(tokens, routing.indices, routing.weights).view_as(hidden_states)
        if self.shared_expert is not None:
            shared, _, _ = self.shared_expert(hidden_states)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
            output = output + shared
        # a router without a state of its own hands on what it received
        state = router_state if routing.state is None else routing.state
        return output, state, self.gate.wanted_losses(routing, context)


FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "mlp": Mlp,
    "moe": SparseMoe,
    "ungated_mlp": UngatedMlp,
}
