"""UltraMem's search for the best of n^2 memory rows: product keys whose scores a small core matrix joins.

Tucker-decomposed query-key retrieval (https://arxiv.org/abs/2411.12364, §3; released code `olmo/ultramem_layer.py`):

    q = norm(W_q x) = (q_1, q_2),   S_1 = norm(keys_1) q_1,   S_2 = norm(keys_2) q_2        (n, r) each
    score of row (i, j) under core c:   S_1[i] C_c S_2[j]^T

The sum over the cores, C = sum_c C_c ~ sigma u v^T, chooses: first the k best i by S_1 u and the k best j by S_2 v,
then the k best of their k^2 pairs by S_1[i] C S_2[j]^T.
Letters: N tokens, D width, H heads, n keys per half, d key size, r Tucker rank, C cores, k rows per head, K = H k.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm
from ..losses import switch_loss
from ..parts import Part
from .recomputation import is_recomputed

HEADS_PER_QUERY = 2  # as in the released code
SINGULAR_MARGIN = 0.15  # what the other singular values of a core may be without a penalty


class TuckerRetrieval(Part):
    """`forward(tokens (N, D), context) -> (indices i n + j (N, K), scores (N, K, C), own weighted losses or None)`.

    u and v are in a buffer: in training every forward pass takes them from the cores as they are, with the sign that
    is nearer to the last one, since the opposite sign would choose the lowest keys; evaluation uses them as they are.
    Scores are at least in fp32. Arguments are the options of `UltraMem`.
    """

    tucker_directions: torch.Tensor  # (2, H, r) u and v

    def __init__(
        self,
        config: Any,
        num_keys: int,
        key_size: int,
        top_k: int,
        num_heads: int,
        tucker_rank: int,
        num_cores: int,
        query_per_rank: bool,
        norm_power: float,
        tucker_loss_coef: float,
        key_balance_loss_coef: float,
    ) -> None:
        super().__init__()
        self.num_keys, self.key_size, self.top_k, self.norm_power = num_keys, key_size, top_k, norm_power
        self.tucker_loss_coef, self.key_balance_loss_coef = tucker_loss_coef, key_balance_loss_coef
        self.query_ranks = tucker_rank if query_per_rank else 1
        num_queries = -(-num_heads // HEADS_PER_QUERY)
        size = num_queries * 2 * self.query_ranks * key_size
        self.query_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.query_norm = RMSNorm(key_size, config.rms_norm_eps)
        self.keys_norm = RMSNorm(key_size, config.rms_norm_eps)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, tucker_rank, key_size))
        self.tucker_core = nn.Parameter(torch.empty(num_cores, num_heads, tucker_rank, tucker_rank))
        self.register_buffer("tucker_directions", torch.full((2, num_heads, tucker_rank), tucker_rank**-0.5))

    def init_weights(self, std: float) -> None:
        for norm in (self.query_norm, self.keys_norm):  # children, which have started at 1
            init.constant_(norm.weight, self.key_size**-self.norm_power)
        init.normal_(self.query_proj.weight, std=self.key_size**-0.5)
        init.normal_(self.keys, std=self.key_size**-0.5)
        init.uniform_(self.tucker_core, 0.0, 1.0)
        # those of the mean of such cores: what to start from must not be random, and not 0 as in the released code
        init.constant_(self.tucker_directions, self.tucker_core.shape[-1] ** -0.5)

    def forward(
        self, tokens: torch.Tensor, context: ForwardContext = NO_CONTEXT
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self.training and not is_recomputed():
            self.tucker_directions.copy_(leading_directions(self.tucker_core, self.tucker_directions))
        scores = self.key_scores(tokens)  # (2, N, H, n, r)
        rows, columns = scores
        core, directions = self.tucker_core.to(scores.dtype), self.tucker_directions.to(scores.dtype, copy=True)
        with torch.autocast(tokens.device.type, enabled=False):  # whose rounding would change the choice
            approximate = torch.einsum("snhmr,shr->snhm", scores, directions)
            with torch.no_grad():
                kept = approximate.topk(self.top_k, dim=-1).indices  # (2, N, H, k)
                pairs = torch.einsum("nhir,hrs,nhjs->nhij", take(rows, kept[0]), core.sum(0), take(columns, kept[1]))
                best = pairs.flatten(2).topk(self.top_k, dim=-1).indices
                row, column = kept[0].gather(-1, best // self.top_k), kept[1].gather(-1, best % self.top_k)
            scores = torch.einsum("nhkr,chrs,nhks->nhkc", take(rows, row), core, take(columns, column))
        losses = self.losses(approximate, kept, context) if context.losses else None
        return (row * self.num_keys + column).flatten(1), scores.flatten(1, 2), losses

    def losses(self, approximate: torch.Tensor, kept: torch.Tensor, context: ForwardContext) -> torch.Tensor | None:
        """The losses with a coefficient, weighted; None if there are none."""
        wanted = []
        if self.tucker_loss_coef:
            wanted.append(self.tucker_loss_coef * tucker_loss(self.tucker_core))
        if self.key_balance_loss_coef:
            wanted.append(self.key_balance_loss_coef * key_balance_loss(approximate, kept, context))
        return torch.stack(wanted).sum() if wanted else None

    def key_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """(2, N, H, n, r): the inner products of all keys of both halves with their query."""
        query = self.query_proj(tokens).unflatten(-1, (-1, 2, self.query_ranks, self.key_size))
        query = self.query_norm(query).repeat_interleave(HEADS_PER_QUERY, dim=1)[:, : self.keys.shape[0]]
        keys = self.keys_norm(self.keys)
        query = query.expand(-1, -1, -1, keys.shape[3], -1)  # (N, H, 2, r, d)
        scores = torch.einsum("nhsrd,hsmrd->snhmr", query, keys.to(query.dtype))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def take(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(N, H, n, r), (N, H, k) -> (N, H, k, r)."""
    return scores.gather(2, indices[..., None].expand(-1, -1, -1, scores.shape[-1]))


@torch.no_grad()
def leading_directions(cores: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(2, H, r) u and v with C ~ sigma u v^T, C the sum of the cores (C, H, r, r), of the sign nearer to `last`."""
    left, _, right = torch.linalg.svd(cores.float().sum(0))
    directions = torch.stack([left[..., 0], right[..., 0, :]]).to(last.dtype)
    same, opposite = ((directions * sign - last).abs().sum((0, -1)) for sign in (1, -1))  # (H,) each
    return directions * torch.where(opposite < same, -1.0, 1.0).to(last.dtype)[:, None]


def tucker_loss(cores: torch.Tensor) -> torch.Tensor:
    """How far the sum of the cores (C, H, r, r) is from rank one, which the first choice takes it for.

    `mean_h sum_{i > 1} max(0, lambda_i - 0.15)^2 / (r - 1)`, lambda the singular values: 0 near rank one.
    """
    return (torch.linalg.svdvals(cores.float().sum(0))[..., 1:] - SINGULAR_MARGIN).relu().square().mean()


def key_balance_loss(scores: torch.Tensor, indices: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Switch's balance loss of the keys that pass the first choice, rows plus columns, over the tokens of all heads.

    2 at perfect balance; 2 n / k when each half always chooses the same k keys with the same shares.

    Args:
        scores: (2, N, H, n).
        indices: (2, N, H, k).
    """
    mask = None
    if context.token_mask is not None:
        mask = context.token_mask.to(scores.device).repeat_interleave(scores.shape[2])
    halves = [
        switch_loss(s.flatten(0, 1).softmax(-1), i.flatten(0, 1), torch.ones_like(i.flatten(0, 1)), mask)
        for s, i in zip(scores, indices)
    ]
    return halves[0] + halves[1]


def check_retrieval(
    num_keys: int,
    /,
    *,
    top_k: int,
    key_size: int,
    num_heads: int,
    key_expansion: int,
    tucker_rank: int,
    tucker_loss_coef: float,
    **options: Any,
) -> None:
    """Raise `ValueError` for options that cannot search `num_keys` keys per half."""
    sizes = {"key_size": key_size, "num_heads": num_heads, "key_expansion": key_expansion, "tucker_rank": tucker_rank}
    if low := [name for name, size in sizes.items() if size < 1]:
        raise ValueError(f"{low} must be at least 1.")
    if not 1 <= top_k <= num_keys:
        raise ValueError(f"top_k={top_k} must be 1 to {num_keys}, the keys of one half.")
    if tucker_loss_coef and tucker_rank == 1:
        raise ValueError("tucker_loss_coef has no effect with tucker_rank=1; drop it.")
