"""Pre-gated MoE: a layer chooses the experts of the next one (https://arxiv.org/abs/2308.12066).

    logits_0 = W_own x_0,   logits_{l+1} = W_pre,l x_l       x_l: what the router of layer l receives

The first routed layer has a gate of its own besides the pre-gate, the last one no pre-gate. The experts of a layer are
known one layer ahead, so that they can be fetched meanwhile. Nothing is recurrent over the sequence, so nothing is
cached.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing, layers_routed_by


class PreGated(Router):
    """Top-k router that reads its logits from the state and sends those of the next pre-gated layer.

    Layers in between that route otherwise, or not at all, let the state pass. Which layer is the first and which the
    last follows from the config's `block_pattern`.

    Args:
        top_k: experts per token; 1 as in Switch, from which the paper fine-tunes.
        normalize: divide the k probabilities by their sum. With one expert the gate would then get no gradient.
    """

    carries_state = True

    def __init__(
        self, config: Any, layer_idx: int, num_experts: int, *, top_k: int = 1, normalize: bool = False
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize = top_k, normalize
        layers = layers_routed_by(config, "pre_gated")
        later = [feed_forward for layer, feed_forward in layers.items() if layer > layer_idx]
        is_first = layer_idx == min(layers)
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size)) if is_first else None
        self.next_weight = None
        if later:
            number = later[0]["num_experts"] + later[0].get("num_zero_experts", 0)
            self.next_weight = nn.Parameter(torch.empty(number, config.hidden_size))

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        for name, block in config.blocks.items():
            feed_forward = block.get("feed_forward", {})
            if feed_forward.get("router", {}).get("type") == "pre_gated" and feed_forward["type"] != "moe":
                raise ValueError(
                    f"A 'pre_gated' router decides once per layer: block {name!r} needs the feed-forward 'moe', not "
                    f"{feed_forward['type']!r}."
                )

    def init_weights(self, std: float) -> None:
        for weight in (self.weight, self.next_weight):
            if weight is not None:
                init.normal_(weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        if self.weight is not None:
            logits = F.linear(tokens, self.weight)
        else:
            assert state is not None, "an earlier layer decides"
            logits = state.to(tokens.device)
        weights, indices = self.scores(logits).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        decision = None if self.next_weight is None else F.linear(tokens, self.next_weight)
        return Routing(logits, weights.to(tokens.dtype), indices, decision)
