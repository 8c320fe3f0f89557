"""RMoE's layer-wise recurrent router (https://arxiv.org/abs/2408.06793, §3).

    u_i = W1_i x,   h_i = cell(u_i, h_{i-1}),   logits_i = W2_i h_i,   h_0 = 0

The recurrence runs over depth, for each token by itself: nothing is recurrent over the sequence, so nothing is cached.
W1_i (P, D) and W2_i (E, P) belong to layer i, the cell is one for all layers. State and router run in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from ..parts import Part
from .base import Router, Routing

CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}


class Float32Linear(nn.Linear):
    """A linear map without bias that computes in fp32 whatever its weight's dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.float(), self.weight.float())


class RouterCell(Part):
    """The cell shared over depth: a torch GRU, RNN or LSTM cell that computes in fp32 whatever its weights' dtype.

    `forward(inputs (N, P), state (N, S)) -> (hidden (N, P), state (N, S))`; S is 2P for an LSTM (hidden and memory), P
    otherwise.
    """

    def __init__(self, cell: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = cell, size
        torch_cell = CELLS[cell](size, size)
        self.weight_ih, self.weight_hh = torch_cell.weight_ih, torch_cell.weight_hh
        self.bias_ih, self.bias_hh = torch_cell.bias_ih, torch_cell.bias_hh

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}"

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight_ih, std=std)
        init.normal_(self.weight_hh, std=std)
        init.zeros_(self.bias_ih)
        init.zeros_(self.bias_hh)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = [p.float() for p in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        if state is None:
            state = inputs.new_zeros(inputs.shape[0], (2 if self.kind == "lstm" else 1) * self.size)
        if self.kind == "lstm":
            hidden, memory = torch.lstm_cell(inputs, state.chunk(2, dim=-1), *parameters)
            return hidden, torch.cat([hidden, memory], dim=-1)
        step = torch.gru_cell if self.kind == "gru" else torch.rnn_tanh_cell
        hidden = step(inputs, state, *parameters)
        return hidden, hidden


class Recurrent(Router):
    """Top-k router whose logits are read from a state carried from layer to layer.

    Args:
        top_k: experts per token.
        state_size: width P of the state (the paper's 128).
        cell: `gru` (the paper's choice), `rnn` or `lstm`.
        normalize: divide the k probabilities by their sum, as the paper does.
    """

    carries_state = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        top_k: int = 2,
        state_size: int = 128,
        cell: str = "gru",
        normalize: bool = True,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize = top_k, normalize
        self.in_proj = Float32Linear(config.hidden_size, state_size, bias=False)
        self.out_proj = Float32Linear(state_size, num_experts, bias=False)

    @classmethod
    def check(cls, config: Any, *, cell: str, **options: Any) -> None:
        if cell not in CELLS:
            raise ValueError(f"cell={cell!r} is unknown; choose from {sorted(CELLS)}.")

    @classmethod
    def shared_modules(cls, config: Any, *, state_size: int, cell: str, **options: Any) -> dict[str, nn.Module]:
        return {"router_cell": RouterCell(cell, state_size)}

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        assert context.shared is not None, "the decoder hands over the cell"
        with torch.autocast(tokens.device.type, enabled=False):  # a state rounded at every layer would drift
            inputs = self.in_proj(tokens)
            hidden, state = context.shared["router_cell"](inputs, state)
            logits = self.out_proj(hidden.to(inputs.device))
        weights, indices = self.scores(logits).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(tokens.dtype), indices, state)
