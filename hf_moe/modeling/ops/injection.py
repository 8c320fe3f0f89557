"""Adds the gradient of a loss to a backward pass that does not know of it."""

from typing import Any

import torch


class InjectGradient(torch.autograd.Function):
    """Identity on `x` whose backward pass also sends gradient 1 into the scalar `loss`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, device = ctx.loss
        return grads[0], torch.ones((), dtype=dtype, device=device)


def inject(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """`x` (...) unchanged; its backward pass adds the gradient of the scalar `loss`."""
    return InjectGradient.apply(x, loss)  # pyright: ignore[reportReturnType]
