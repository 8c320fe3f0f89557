"""UltraMem: a huge table of values, of which a token reads a few (https://arxiv.org/abs/2411.12364, version 2:
https://arxiv.org/abs/2508.18756).

    y = FFN(x) + W_o sum_k s_k V[i_k],   (i, s) = Tucker retrieval of x                                     version 1
    y = FFN(x) + W_o sum_k s_k (W_p x . P[i_k]) V[i_k]                                                       version 2

Implicit value expansion: the keys span e^2 virtual tables of the same rows; the sums of each may have a projection of
their own. Pair (a, b) of the keys is virtual row `shuffle[a n + b]`, a fixed random permutation. Released code:
`ZihaoHuang-notabot/Ultra-Sparse-Memory-Network`; its Python path of version 2 halves the query twice and cannot run,
so queries are laid out as in version 1.
Letters: D width, N tokens, L memory layers, K rows per token, V value, P pre-value size, C cores, G projections.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..ops.memory_table import MemoryTable, check_table, permutation_of, side_of
from ..ops.tucker_retrieval import TuckerRetrieval, check_retrieval
from .base import FeedForward, FeedForwardOutput
from .memory_receiver import check_delays, layers_of
from .mlp import Mlp


class UltraMem(FeedForward):
    """A memory beside the dense feed-forward, which reads the same normed input. Defaults are those of version 2.

    Args:
        num_keys: a layer adds num_keys^2 rows to the memory.
        value_size: width V of a value.
        intermediate_size: width of the dense feed-forward.
        pre_value_size: width P of a pre-value; 0 for none (version 1).
        pre_activation: what the product with the pre-value goes through, a key of `ACT2FN`; None in the paper.
        share_ratio: all layers own one table of L num_keys^2 rows together, in `model.shared`, and each reads this
            share of it, rounded down to a square, from its own rows on, wrapping around. Below 1 / L some rows are
            never read. None: every layer has a table of its own (version 1).
        top_k: rows that each head chooses.
        num_heads: retrievals per token, with keys of their own; two of them share a query, as in the released code.
        key_size: width of a key and of half a query.
        key_expansion: e; the keys address e^2 virtual tables.
        separate_projections: W_o of each virtual table's own (version 1) instead of one for their sum.
        num_cores: Tucker cores; a value is cut into as many pieces, each scaled by its own core's score.
        tucker_rank: r of a core.
        query_per_rank: a query of its own for each of the r entries.
        norm_power: the norms of queries and keys start at `key_size ** -norm_power`: 0.4, in version 1 0.33.
        delayed: hand the memory's output to the next `memory_receiver` instead of adding it here (version 1).
        tucker_loss_coef: weight of the penalty for cores that are not of rank one (`ops/tucker_retrieval.py`); 0.001
            in the released config, whose code never adds it.
        key_balance_loss_coef: weight of the balance loss of the keys, which is 2 at perfect balance; off.
    """

    carries_state = True  # where `delayed`
    shuffle: torch.Tensor  # (virtual rows,) int32
    tp_plan = {f"dense.{name}": style for name, style in Mlp.tp_plan.items()}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_keys: int,
        value_size: int,
        intermediate_size: int,
        pre_value_size: int = 0,
        pre_activation: str | None = None,
        share_ratio: float | None = None,
        top_k: int = 32,
        delayed: bool = False,
        key_expansion: int = 1,
        separate_projections: bool = False,
        num_heads: int = 1,
        key_size: int = 192,
        num_cores: int = 2,
        tucker_rank: int = 2,
        query_per_rank: bool = False,
        norm_power: float = 0.4,
        tucker_loss_coef: float = 0.0,
        key_balance_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        width, self.layer_idx, self.delayed = config.hidden_size, layer_idx, delayed
        layers = [layer_idx] if share_ratio is None else layers_of(config, "ultra_mem")
        self.total_rows, self.first_row = len(layers) * num_keys**2, layers.index(layer_idx) * num_keys**2
        side = side_of(self.total_rows, share_ratio)
        self.num_rows = side**2  # that this layer reads
        self.num_groups = key_expansion**2 if separate_projections else 1
        self.dense = Mlp(config, layer_idx, intermediate_size=intermediate_size)
        sizes = (key_expansion * side, key_size, top_k, num_heads, tucker_rank, num_cores)
        coefs = (tucker_loss_coef, key_balance_loss_coef)
        self.retrieval = TuckerRetrieval(config, *sizes, query_per_rank, norm_power, *coefs)
        shuffle = permutation_of((key_expansion * side) ** 2, layer_idx)
        self.register_buffer("shuffle", torch.empty(len(shuffle), dtype=torch.int32).copy_(shuffle))
        table = (self.total_rows, value_size, pre_value_size, pre_activation)
        self.memory = MemoryTable(*table) if share_ratio is None else None
        self.pre_values_proj = nn.Linear(width, pre_value_size, bias=False) if pre_value_size else None
        self.values_proj = nn.Linear(self.num_groups * value_size, width, bias=False)

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        check_table(num_rows_of(config, options), **options)
        side = side_of(num_rows_of(config, options), options["share_ratio"])
        check_retrieval(options["key_expansion"] * side, **options)
        check_delays(config)

    @classmethod
    def shared_modules(cls, config: Any, **options: Any) -> dict[str, nn.Module]:
        if options["share_ratio"] is None:
            return {}
        sizes = options["value_size"], options["pre_value_size"], options["pre_activation"]
        return {"memory": MemoryTable(num_rows_of(config, options), *sizes)}

    def init_weights(self, std: float) -> None:
        init.copy_(self.shuffle, permutation_of(self.shuffle.numel(), self.layer_idx))
        for linear in (self.values_proj, self.pre_values_proj):  # children, which have started already
            if linear is not None:
                init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        remembered, own = self.remember(hidden_states.flatten(0, -2), context)
        losses = None if own is None else torch.stack([torch.zeros_like(own), torch.zeros_like(own), own])
        output, remembered = self.dense(hidden_states)[0], remembered.view_as(hidden_states)
        if self.delayed:
            return output, remembered, losses
        return output + remembered, router_state, losses

    def remember(self, tokens: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, D) output of the memory, and its own losses."""
        chosen, scores, losses = self.retrieval(tokens, context)  # (N, K), (N, K, C)
        virtual = self.shuffle[chosen].long()
        rows = (virtual % self.num_rows + self.first_row) % self.total_rows
        groups = virtual // self.num_rows if self.num_groups > 1 else None
        pre = None if self.pre_values_proj is None else self.pre_values_proj(tokens)
        if (memory := self.memory) is None:
            assert context.shared is not None, "the decoder hands over the table"
            memory = context.shared["memory"]
        values = memory(rows, scores, groups, self.num_groups, pre)  # (N, G V)
        return self.values_proj(values.to(tokens.device, tokens.dtype)), losses


def num_rows_of(config: Any, options: dict[str, Any]) -> int:
    """Rows of the table that a layer with these options reads: its own, or those of all memory layers."""
    return options["num_keys"] ** 2 * (1 if options["share_ratio"] is None else len(layers_of(config, "ultra_mem")))
