"""What all our tuners do with a module that they adapt."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class StandsIn(nn.Module, BaseTunerLayer):
    """A layer around another, which is asked for whatever this one has not, such as `num_experts`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


class OneKindTuner(BaseTuner):
    """A tuner that puts layers of one class in the place of its targets."""

    layer_class: ClassVar[type[nn.Module]]
    target_module_mapping: dict[str, list[str]] = {}

    def make(self, base_layer: nn.Module, name: str) -> nn.Module:
        """A layer around a module of that name."""
        return self.layer_class(base_layer, name)

    def settings(self, peft_config: Any, name: str) -> tuple[Any, ...]:
        """What `update_layer` takes beside the adapter's name."""
        return (peft_config,)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        make, settings = partial(self.make, name=current_key), self.settings(peft_config, current_key)
        adapt(self, make, self.layer_class, target, target_name, parent, adapter_name, *settings)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's looks for a `weight`


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
