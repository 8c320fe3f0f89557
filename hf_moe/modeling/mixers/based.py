"""BASED's linear attention (https://arxiv.org/abs/2402.18668, section 4): a feature map and a running denominator.

    y_t = sum_{j<=t} phi(q_t).phi(k_j) v_j  /  (sum_{j<=t} phi(q_t).phi(k_j) + eps)

as the recurrence  S_t = S_{t-1} + phi(k_t) [v_t, 1]^T,  [a, b] = S_t^T phi(q_t),  y_t = a / (b + eps).

Letters: B batch, T time, H heads, d feature dim, F features of a head, V head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..feature_maps import FEATURE_MAPS
from ..ops.linear_attention import linear_attention
from ..packing import Rows
from ..parts import Slot, build
from .recurrent_mixer import RecurrentMixer

TAYLOR = {"type": "taylor"}


class Based(RecurrentMixer):
    """Normalized linear attention without positions; the state has F (V + 1) float32 numbers per head.

    There are `num_attention_heads` heads of keys and values as well: no cache of keys grows that fewer would shrink.

    Args:
        feature_dim: width of a head's queries and keys; the Taylor map makes 1 + d + d (d + 1) / 2 features of them.
        feature_map: spec of a part in `FEATURE_MAPS`; queries and keys have one each.
        eps: added to the denominator. With the Taylor map, whose scores are at least 1/2, it hardly matters.
    """

    slots = {"feature_map": Slot("query_map", FEATURE_MAPS)}
    # heads of the state and of learnable maps would have to be sharded along
    tp_plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        feature_dim: int = 16,
        feature_map: dict[str, Any] = TAYLOR,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.layer_idx, self.eps = layer_idx, eps
        self.num_heads, self.head_dim, self.feature_dim = config.num_attention_heads, config.head_dim, feature_dim
        self.query_map = build(FEATURE_MAPS, feature_map, self.num_heads, feature_dim)
        self.key_map = build(FEATURE_MAPS, feature_map, self.num_heads, feature_dim)
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    @classmethod
    def check(cls, config: Any, *, feature_dim: int, eps: float, **options: Any) -> None:
        if feature_dim < 1:
            raise ValueError(f"feature_dim={feature_dim}: queries and keys need at least one entry, e.g. 16.")
        if eps <= 0:
            raise ValueError(f"eps={eps} must be positive: some feature maps make all scores of a token zero.")

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = (hidden_states.shape[0], self.num_heads, self.key_map.size, self.head_dim + 1)
        return (hidden_states.new_zeros(size, dtype=torch.float32),)

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        shape = (*hidden_states.shape[:-1], self.num_heads, -1)
        query = self.query_map(self.q_proj(hidden_states).view(shape))  # (B, T, H, F)
        key = self.key_map(self.k_proj(hidden_states).view(shape))
        value = F.pad(self.v_proj(hidden_states).view(shape), (0, 1), value=1.0)  # (B, T, H, V + 1)
        output, state = linear_attention(query, key, value, states[0], rows, owner=type(self).__name__)
        output = output[..., :-1] / (output[..., -1:] + self.eps)
        return self.o_proj(output.flatten(2).to(hidden_states.dtype)), (state,)
