"""What all our tuners do with a module that they adapt."""

from collections.abc import Callable
from typing import Any

from torch import nn


def adapt(
    tuner: Any,
    make: Callable[[nn.Module], Any],
    kind: type[nn.Module],
    target: Any,
    target_name: str,
    parent: nn.Module,
    adapter: str,
    *settings: Any,
) -> None:
    """Put a layer with an adapter in the place of a module, or give the layer that is there another adapter.

    Args:
        tuner: PEFT's, with its active adapters.
        make: the layer around a module.
        kind: class of the layer.
        target, target_name, parent: the module, and where it is.
        adapter: name of the adapter.
        settings: what else `update_layer` of the layer takes.
    """
    if isinstance(target, kind):
        target.update_layer(adapter, *settings)  # pyright: ignore[reportCallIssue]
        return
    layer = make(target)
    layer.update_layer(adapter, *settings)
    if adapter not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)
