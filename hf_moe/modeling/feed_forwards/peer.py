"""PEER: a few of a million experts of one neuron each, found by product keys (https://arxiv.org/abs/2407.04153).

    q_h = norm(W_q x)_h = (q_h1, q_h2),   s_h(i, j) = c_i . q_h1 + c'_j . q_h2,   expert e = i n + j of E = n^2
    y = sum_h sum_{e of the k best s_h} g(s_h)_e act(u_e . x) v_e

The k best of the n^2 sums are among the k best i times the k best j, so no more than n + k^2 scores per head exist.
Letters: B batch, T time, N = B T tokens, D width, H heads, n keys per half, d key size, k experts per head, K = H k.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from ..ops.batch_norm import TokenBatchNorm
from ..ops.row_lookup import row_products, weighted_rows
from .base import FeedForward, FeedForwardOutput

EXPERT_SCORINGS = ("softmax", "sigmoid", "relu")
QUERY_NORMS = ("batch", None)


class Peer(FeedForward):
    """Mixture of `num_keys^2` single-neuron experts (algorithm 1). A router state passes through untouched.

    There is no balance loss: normalised queries spread the load (the paper's ablation of expert usage).

    Args:
        num_keys: keys n of each half; there are n^2 experts, 1024^2 in the paper.
        key_size: width d of a key, half that of a query.
        num_heads: queries per token; all search the same experts, whose outputs are added up.
        top_k: experts per head.
        scoring: g, from scores to weights: `softmax` over a head's chosen ones (the paper), or `sigmoid` or `relu` of
            each by itself (`relu` lets experts not compete, as a community implementation does).
        query_norm: `batch` normalises each entry of the queries over the tokens of the batch, with running statistics
            in evaluation; None leaves them as projected. The paper reports both and recommends the first.
        keys_per_head: keys of each head's own instead of the same for all heads. The paper shares them; community
            code does not.
        activation: a key of Transformers' `ACT2FN`.
    """

    spans_batch = True  # through `query_norm`

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_keys: int,
        key_size: int = 128,
        num_heads: int = 8,
        top_k: int = 16,
        scoring: str = "softmax",
        query_norm: str | None = "batch",
        keys_per_head: bool = False,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.num_keys, self.key_size, self.num_heads, self.top_k = num_keys, key_size, num_heads, top_k
        self.scoring, self.act_fn = scoring, ACT2FN[activation]
        width = config.hidden_size
        self.query_proj = nn.Linear(width, num_heads * 2 * key_size, bias=False)
        self.query_norm = TokenBatchNorm(num_heads * 2 * key_size) if query_norm == "batch" else None
        self.keys = nn.Parameter(torch.empty(num_heads if keys_per_head else 1, 2, num_keys, key_size))
        self.w_down = nn.Parameter(torch.empty(num_keys**2, width))  # u_e
        self.w_up = nn.Parameter(torch.empty(num_keys**2, width))  # v_e

    @classmethod
    def check(cls, config: Any, *, num_keys: int, top_k: int, **options: Any) -> None:
        for name, size in (("num_keys", num_keys), *((name, options[name]) for name in ("key_size", "num_heads"))):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")
        if not 1 <= top_k <= num_keys**2:
            raise ValueError(f"top_k={top_k} must be 1 to num_keys^2 = {num_keys**2}, the number of experts.")
        for name, choices in (("scoring", EXPERT_SCORINGS), ("query_norm", QUERY_NORMS)):
            if options[name] not in choices:
                raise ValueError(f"{name}={options[name]!r} is unknown; choose from {list(choices)}.")
        if options["activation"] not in ACT2FN:
            raise ValueError(f"Unknown activation {options['activation']!r}; choose from {sorted(ACT2FN)}.")

    def init_weights(self, std: float) -> None:
        init.normal_(self.keys, std=self.key_size**-0.5)  # scores of normalised queries start with variance 2
        init.normal_(self.w_down, std=std)
        init.normal_(self.w_up, std=std)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        scores, experts = self.retrieve(tokens, context)  # (N, H, k)
        weights, experts = self.weigh(scores).flatten(1), experts.flatten(1)  # (N, K)
        neurons = self.act_fn(row_products(self.w_down, experts, tokens))
        output = weighted_rows(self.w_up, experts, weights * neurons.to(weights.dtype))
        return output.to(tokens.dtype).view_as(hidden_states), router_state, None

    def retrieve(self, tokens: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, at least in fp32, and numbers of the k best experts of every head: both (N, H, k)."""
        query = self.query_proj(tokens)
        if self.query_norm is not None:
            query = self.query_norm(query, context)
        query = query.unflatten(-1, (self.num_heads, 2, self.key_size))
        keys = self.keys.expand(self.num_heads, -1, -1, -1)
        halves = torch.einsum("nhsd,hsmd->nhsm", query, keys.to(query.dtype))
        halves = halves.to(torch.promote_types(halves.dtype, torch.float32))
        scores, indices = halves.topk(min(self.top_k, self.num_keys), dim=-1)  # (N, H, 2, k)
        pairs = scores[:, :, 0, :, None] + scores[:, :, 1, None]  # (N, H, k, k)
        experts = indices[:, :, 0, :, None] * self.num_keys + indices[:, :, 1, None]
        best, chosen = pairs.flatten(2).topk(self.top_k, dim=-1)
        return best, experts.flatten(2).gather(-1, chosen)

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Combine weights of the chosen experts."""
        if self.scoring == "softmax":
            return scores.softmax(-1)
        return scores.sigmoid() if self.scoring == "sigmoid" else scores.relu()
