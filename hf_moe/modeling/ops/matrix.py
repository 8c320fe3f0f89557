"""The matrix of a linear layer that is used without calling the layer, whatever has been put on top of it."""

import torch
from torch import nn


def is_plain(layer: nn.Module, device: torch.device) -> bool:
    """Whether `layer.weight` says all that the layer does: no adapter, quantisation, hook or offloaded weight."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and layer.bias is None and not hooked and layer.weight.device == device


def matrix_of(layer: nn.Module, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer that is linear in its input of `width` entries, as `matrix (outputs, width), offset (outputs,)`.

    Adapters, quantised weights and offloading act only where a layer is called: unless it is plain, it is asked for
    its outputs at zero and at each unit vector, which costs as much as `width` tokens.
    """
    if is_plain(layer, like.device):
        weight: torch.Tensor = layer.weight  # pyright: ignore - a plain layer has one
        return weight, weight.new_zeros(weight.shape[0])
    outputs = layer(torch.eye(width + 1, width, dtype=like.dtype, device=like.device))
    return (outputs[:-1] - outputs[-1]).transpose(0, 1), outputs[-1]
