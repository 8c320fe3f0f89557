"""SPT's routed feed-forward (https://arxiv.org/abs/2312.10365, code `ytgui/SPT-proto`): blocks of a dense one.

    y = sum_g c_g W_down,g (act(c_g W_gate,g x) * c_g W_up,g x),    c = 2 sigmoid(W x + b)

over the blocks g that score best, half of them. A block is a run of inner neurons of a trained dense feed-forward,
whose weights keep their names and shapes. This is the code's fine-tuning form for Llama: all three products are scaled
(its other form scales none, so that the router would not learn). A router of zeros with all blocks is the dense
feed-forward, exactly. Scaled once, at the end, it is `moe` with the router {"type": "top_k", "scoring": "sigmoid",
"normalize": False, "scale": 2.0, "bias": True}.

In the released code LoRA's products are not scaled; PEFT's LoRA on these weights (`target_parameters`) is, as part of
them.
Letters: B batch, T time, D width, F inner width, G blocks, K chosen blocks, N = B T tokens, S = N K rows.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..context import NO_CONTEXT, ForwardContext
from ..ops.grouped import GroupedRows
from ..parts import Part
from ..routers import TopK
from .base import FeedForward, FeedForwardOutput


class RoutedFfn(FeedForward):
    """A gated feed-forward of which each token uses the best blocks only.

    Args:
        intermediate_size: F.
        num_blocks: G, which divides F.
        blocks_per_token: K; half of G if None, as in the released code.
        balance: whether `router_aux_loss_coef` balances the blocks; the released code has no balance loss.
    """

    # no tp_plan: blocks are chosen by token

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        intermediate_size: int,
        num_blocks: int = 4,
        blocks_per_token: int | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.num_blocks, self.balance = config, num_blocks, balance
        number = number_chosen(num_blocks, blocks_per_token)
        self.gate = TopK(
            config, layer_idx, num_blocks, top_k=number, normalize=False, scoring="sigmoid", scale=2.0, bias=True
        )
        width = config.hidden_size
        self.gate_proj = BlockLinear(width, intermediate_size, num_blocks, split="output")
        self.up_proj = BlockLinear(width, intermediate_size, num_blocks, split="output")
        self.down_proj = BlockLinear(intermediate_size, width, num_blocks, split="input")
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def check(
        cls, config: Any, *, intermediate_size: int, num_blocks: int, blocks_per_token: int | None, **options: Any
    ) -> None:
        if num_blocks < 1 or intermediate_size % num_blocks:
            valid = [n for n in range(1, min(intermediate_size, 64) + 1) if intermediate_size % n == 0]
            raise ValueError(
                f"num_blocks={num_blocks} does not divide intermediate_size={intermediate_size}; use one of {valid}."
            )
        if not 1 <= (number := number_chosen(num_blocks, blocks_per_token)) <= num_blocks:
            raise ValueError(f"blocks_per_token={number}; with num_blocks={num_blocks} it must be 1 to {num_blocks}.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        context: ForwardContext = NO_CONTEXT,
    ) -> FeedForwardOutput:
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        routing = self.gate(tokens, None, context)
        rows = GroupedRows(routing.indices, self.num_blocks, self.config._experts_implementation)
        scale = rows.order(routing.weights)[:, None]  # (S, 1)
        entering = tokens.index_select(0, rows.token)
        gate, up = (scale * projection(entering, rows) for projection in (self.gate_proj, self.up_proj))
        output = rows.sum(scale * self.down_proj(self.act_fn(gate) * up, rows)).to(tokens.dtype)
        losses = self.gate.wanted_losses(routing, context)
        if losses is not None and not self.balance:
            losses = torch.cat([losses.new_zeros(1), losses[1:]])
        return output.view_as(hidden_states), router_state, losses


class BlockLinear(Part):
    """A linear map cut into blocks of consecutive outputs or inputs; the weight is stored like `nn.Linear`'s."""

    def __init__(self, input_size: int, output_size: int, num_blocks: int, split: str) -> None:
        super().__init__()
        self.num_blocks, self.split = num_blocks, split
        self.weight = nn.Parameter(torch.empty(output_size, input_size))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.num_blocks} blocks of {self.split}s"

    def forward(self, values: torch.Tensor, rows: GroupedRows) -> torch.Tensor:
        """(S, I) -> (S, O), each row by the block that it is for."""
        if self.split == "output":
            return rows.linear(values, self.weight.unflatten(0, (self.num_blocks, -1)))
        return rows.linear(values, self.weight.unflatten(1, (self.num_blocks, -1)).transpose(0, 1))


def number_chosen(num_blocks: int, blocks_per_token: int | None) -> int:
    """K."""
    return max(num_blocks // 2, 1) if blocks_per_token is None else blocks_per_token
