"""Monet: n^2 experts put together from 2 n halves, so that none of them is ever formed (https://arxiv.org/abs/2412.04139).

    y = sum_h sum_i sum_j g1_hi g2_hj E_ij(x),   sum_i g1_hi = sum_j g2_hj = 1
    horizontal:   E_ij(x) = V_j act(U_i x + a_i) + b_j
    vertical:     E_ij(x) = [V11_i p_i + V12_i q_j + b1_i ; V21_j p_i + V22_j q_j + b2_j]
                  with the halves   p_i = act(U1_i x + a1_i),   q_j = act(U2_j x + a2_j)

Reordering the sums (§3, eq. 12 and appendix A.1) leaves matrix products over 2 n halves. Letters: B batch, T time,
D width, N = B T tokens, H heads, n keys of a side, m width of one expert. Weights have the names of the public code.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from ..routers.monet_router import MonetRouter
from .base import FeedForward, FeedForwardOutput
from .monet_experts import HorizontalExperts, VerticalExperts

DECOMPOSITIONS = ("horizontal", "vertical")


class Monet(FeedForward):
    """All n^2 experts, weighted by a router that this layer has or that an earlier one had: the probabilities travel
    from layer to layer as router state. With `num_heads` heads a token's weights sum to `num_heads`.

    Args:
        num_keys: keys n of a side; there are n^2 experts (512: 262,144).
        num_heads: heads H of the router.
        expert_size: hidden width m of one expert.
        top_k: keys that a head keeps on either side, on average (32 of 512).
        decomposition: `vertical` (the paper's better one) or `horizontal`.
        own_router: whether this layer routes; if not, it uses what the last one that did found. The paper's models
            route in every fourth layer.
        activation: a key of Transformers' `ACT2FN`.
        momentum: share of a batch in the running statistics of the router's batch normalisation.
        uniformity_loss_coef, ambiguity_loss_coef: weights of the paper's losses of each router (its lambda). They
            are summed over the routers, which the paper leaves open.
    """

    carries_state = True
    spans_batch = True  # the router's batch normalisation

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_keys: int,
        num_heads: int,
        expert_size: int,
        top_k: int,
        decomposition: str = "vertical",
        own_router: bool = True,
        activation: str = "relu2",
        momentum: float = 0.1,
        uniformity_loss_coef: float = 0.001,
        ambiguity_loss_coef: float = 0.001,
    ) -> None:
        super().__init__()
        self.num_heads, self.own_router = num_heads, own_router
        if own_router:
            coefs = uniformity_loss_coef, ambiguity_loss_coef
            self.gate = MonetRouter(config, layer_idx, num_keys, num_heads, top_k, momentum, *coefs)
        kind = VerticalExperts if decomposition == "vertical" else HorizontalExperts
        self.expert_grid = kind(config.hidden_size, num_keys, expert_size, activation)

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        keys, top_k, decomposition = options["num_keys"], options["top_k"], options["decomposition"]
        if options["activation"] not in ACT2FN:
            raise ValueError(f"Unknown activation {options['activation']!r}; choose from {sorted(ACT2FN)}.")
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition={decomposition!r} is unknown; choose from {list(DECOMPOSITIONS)}.")
        if not 1 <= top_k <= keys:
            raise ValueError(f"top_k={top_k}; with num_keys={keys} it must be 1 to {keys}.")
        if min(options["num_heads"], options["expert_size"]) < 1:
            raise ValueError("num_heads and expert_size must be at least 1.")
        if decomposition == "vertical" and (options["expert_size"] % 2 or config.hidden_size % 2):
            raise ValueError(
                f"A vertical decomposition halves experts: expert_size={options['expert_size']} and hidden_size="
                f"{config.hidden_size} must be even."
            )
        used = [spec for name in config.block_pattern for spec in monet_specs(config.blocks[name])]
        if used and not used[0].get("own_router", True):
            raise ValueError("The first 'monet' of block_pattern has no routing to reuse: set its own_router=True.")
        if len(sizes := {(spec["num_keys"], spec["num_heads"]) for spec in used}) > 1:
            raise ValueError(f"All 'monet' share one routing, but their (num_keys, num_heads) are {sorted(sizes)}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens, losses = hidden_states.flatten(0, -2), None
        if self.own_router:
            routing = self.gate(tokens, None, context)
            router_state, losses = routing.state, self.gate.wanted_losses(routing, context)
        assert router_state is not None, "`check` has seen to it that an earlier layer routes"
        first, second = router_state.unflatten(-1, (2, self.num_heads, -1)).unbind(1)  # (N, H, n) each
        return self.expert_grid(tokens, first, second).view_as(hidden_states), router_state, losses


def monet_specs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every spec of a `monet` in the spec of a block."""
    if spec.get("type") == "monet":
        yield spec
    for inner in spec.values():
        if isinstance(inner, dict):
            yield from monet_specs(inner)
