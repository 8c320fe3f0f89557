"""Causal depthwise convolution over time that can be continued, padded and packed.

Letters: B batch, T time, C channels, W kernel width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..packing import Rows
from ..parts import Part


class CausalConv1d(Part):
    """`y_t = sum_j weight_j x_{t-W+1+j} + bias`, each channel by itself; weights are laid out as in `nn.Conv1d`."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.init_weights()

    def init_weights(self, std: float = 0.0) -> None:
        """PyTorch's initialisation of `nn.Conv1d`: uniform within 1 / sqrt(W)."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters(recurse=False):
            init.uniform_(parameter, -bound, bound)

    def initial_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, W - 1) zeros: what stands before the first token."""
        channels, _, width = self.weight.shape
        return hidden_states.new_zeros(hidden_states.shape[0], channels, width - 1)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            inputs: (B, T, C).
            state: (B, C, W - 1) the last inputs of the call before.
            rows: padding is read as zero and never becomes state; nothing is read across sequences of one row.

        Returns:
            Output (B, T, C), and the new state: the last W - 1 inputs up to the last real token.
        """
        if rows.mask is None:
            return self.convolve(inputs, state, rows.segments, None)
        # real tokens to the left, in their order: then padding is never between them, nor before the state
        order = (~rows.mask).sort(dim=1, stable=True).indices
        segments = None if rows.segments is None else rows.segments.gather(1, order)
        moved = rows.keep(inputs).gather(1, order[..., None].expand_as(inputs))
        output, state = self.convolve(moved, state, segments, rows.mask.sum(1))
        return torch.empty_like(output).scatter(1, order[..., None].expand_as(output), output), state

    def convolve(
        self, inputs: torch.Tensor, state: torch.Tensor, segments: torch.Tensor | None, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for rows whose first `lengths` (B,) tokens are real, or all of them."""
        width = self.weight.shape[-1]
        line = torch.cat([state.to(inputs.dtype), inputs.transpose(1, 2)], -1)  # (B, C, W - 1 + T)
        if segments is None:
            output = F.conv1d(line, self.weight.to(line.dtype), groups=line.shape[1])
        else:  # the state comes from the first sequence and goes to the last one; ids ascend
            columns = torch.cat([segments.amin(1, keepdim=True).expand(-1, width - 1), segments], 1)
            same = columns.unfold(1, width, 1) == segments[..., None]  # (B, T, W)
            output = (line.unfold(2, width, 1) * same[:, None] * self.weight).sum(-1)
            line = line * (columns == segments.amax(1, keepdim=True))[:, None]
        if self.bias is not None:
            output = output + self.bias[:, None]
        return output.transpose(1, 2).to(inputs.dtype), self.last(line, lengths)

    def last(self, line: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """(B, C, W - 1): the part of `line` that ends with each row's last real token."""
        length = self.weight.shape[-1] - 1
        if lengths is None:
            return line[..., line.shape[-1] - length :]
        index = lengths[:, None] + torch.arange(length, device=line.device)  # `length` columns of state stand before
        return line.gather(-1, index[:, None].expand(-1, line.shape[1], -1))
