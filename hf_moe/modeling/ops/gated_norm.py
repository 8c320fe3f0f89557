"""RMSNorm with an output gate, which keeps nothing but its inputs for the backward pass."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

ROWS_AT_ONCE = 2048


class GatedRMSNorm(nn.Module):
    """`weight * x / rms(x) * activation(gate)` over the last dimension, in at least fp32, returned in the dtype of x.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        swish: the activation is `gate * sigmoid(gate)`, not `sigmoid(gate)`.
    """

    def __init__(self, size: int, eps: float, swish: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.swish = eps, swish

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, swish={self.swish}"

    def forward(self, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        rows = (x.reshape(-1, len(self.weight)) for x in (values, gate))
        return NormAndGate.apply(*rows, self.weight, self.eps, self.swish).view_as(values)


class NormAndGate(torch.autograd.Function):
    """`apply(values (N, X), gate (N, X), weight (X,), eps, swish)`, some rows at a time; twice if gradients follow."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, swish: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(values, gate, weight)
        ctx.eps, ctx.swish = eps, swish
        output = torch.empty_like(values)
        for start in range(0, len(values), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            normed, _ = normalize(values[part], eps)
            active, _ = activate(gate[part].to(normed.dtype), swish)
            output[part] = normed * weight * active
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, gate, weight = ctx.saved_tensors
        d_values, d_gate, d_weight = torch.empty_like(values), torch.empty_like(gate), torch.zeros_like(weight)
        for start in range(0, len(values), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            normed, scale = normalize(values[part], ctx.eps)
            active, slope = activate(gate[part].to(normed.dtype), ctx.swish)
            d_output = gradient[part].to(normed.dtype)
            d_gate[part] = d_output * normed * weight * slope
            d_weight = d_weight + (d_output * normed * active).sum(0)
            d_normed = d_output * weight * active
            d_values[part] = scale * (d_normed - normed * (normed * d_normed).mean(-1, keepdim=True))
        return d_values, d_gate, d_weight.to(weight.dtype), None, None


def activate(gate: torch.Tensor, swish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its slope."""
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 - sigmoid)
    return (gate * sigmoid, sigmoid + gate * slope) if swish else (sigmoid, slope)


def normalize(values: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over their root mean square, and one over that, in at least fp32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    scale = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return values * scale, scale
