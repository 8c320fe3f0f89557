"""Routing by a conditioning vector instead of the token, such as a noise level (MoDE, https://arxiv.org/abs/2412.12953).

    logits = W_2 gelu(W_1 c + b_1) + b_2,   chosen = topk,   w_e = softmax(logits)_e, divided by their sum

c comes with the model call as `router_condition`. All tokens of a sequence with one condition share their experts.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing


class Condition(Router):
    """Top-k router on `context.inputs["router_condition"]`, of shape (B, C), or (B, T, C) for one per token.

    Where the call gives no condition, a learned vector `null_condition` (C,) stands in for it: the unconditional
    branch of classifier-free guidance. To train it, leave the condition out of some batches. `generate` takes (B, C)
    only, as it does not know how to continue one per token.

    Args:
        condition_size: width C.
        top_k: experts per token; 2 of 4 in MoDE.
        normalize: divide the k probabilities by their sum.
        sample: in training, draw the k experts of each token by their probabilities, without replacement, as MoDE
            does; otherwise, and in evaluation, the k best.
        expansion: width between the two layers, in units of C.
        activation: of the layer between, a key of Transformers' `ACT2FN`.
        gated: multiply the activation by a second linear map. MoDE's released code has that, with `silu` and an
            expansion of 4; the default is the form of the paper.
    """

    reads_inputs = ("router_condition",)

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        condition_size: int,
        top_k: int = 2,
        normalize: bool = True,
        sample: bool = True,
        expansion: int = 2,
        activation: str = "gelu",
        gated: bool = False,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize, self.sample, self.gated = top_k, normalize, sample, gated
        self.condition_size, width = condition_size, expansion * condition_size
        self.null_condition = nn.Parameter(torch.empty(condition_size))
        self.in_proj = nn.Linear(condition_size, 2 * width if gated else width)
        self.out_proj = nn.Linear(width, num_experts)
        self.act_fn = ACT2FN[activation]

    @classmethod
    def check(cls, config: Any, *, condition_size: int, expansion: int, activation: str, **options: Any) -> None:
        if condition_size < 1 or expansion < 1:
            raise ValueError(f"condition_size={condition_size} and expansion={expansion} must be at least 1.")
        if activation not in ACT2FN:
            raise ValueError(f"Unknown activation {activation!r}; choose from {sorted(ACT2FN)}.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.null_condition, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        hidden = self.in_proj(self.condition(tokens, context))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.act_fn(gate) * hidden
        else:
            hidden = self.act_fn(hidden)
        logits = self.out_proj(hidden)  # (B or 1, T or 1, E)
        batch, time = context.shape or (1, tokens.shape[0])
        logits = logits.expand(batch, time, -1).reshape(-1, self.num_experts)
        ranking = scores = self.scores(logits)
        if self.training and self.sample:  # the largest of p / exponential noise are a draw without replacement
            ranking = scores.detach() / torch.empty_like(scores).exponential_().clamp(min=1e-20)
        indices = ranking.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(tokens.dtype), indices)

    def condition(self, tokens: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(B or 1, T or 1, C) what this call is conditioned on, in the dtype of the tokens.

        Raises:
            ValueError: a condition of another shape.
        """
        condition = context.inputs.get("router_condition")
        if condition is None:
            return self.null_condition[None, None]
        batch, time = context.shape or (1, tokens.shape[0])
        size = self.condition_size
        if tuple(condition.shape) not in ((batch, size), (batch, time, size)):
            raise ValueError(
                f"router_condition has shape {tuple(condition.shape)}; it must be {(batch, size)}, or "
                f"{(batch, time, size)} for one per token."
            )
        condition = condition.view(batch, -1, size).to(tokens)
        # data-parallel training waits for the gradient of every parameter
        return condition + 0 * self.null_condition if self.training else condition
