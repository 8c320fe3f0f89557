"""hf_moe: mixtures of experts for Transformers.

Importing the package makes its architectures known to the Auto classes; after that
`AutoModelForCausalLM.from_pretrained` loads them like any other model. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .lazy import after_import, watch_config_types

if TYPE_CHECKING:
    from .api import *

__version__ = "0.1.0"


def repair_jetmoe() -> None:
    """Mend Transformers' JetMoE, as soon as somebody imports it."""
    from .modeling.jetmoe import repair_jetmoe

    repair_jetmoe()


watch_config_types()
after_import("transformers.models.jetmoe.modeling_jetmoe", repair_jetmoe)


def __getattr__(name: str) -> Any:
    """Whatever `api` has."""
    if name.startswith("__"):
        raise AttributeError(name)
    value = globals()[name] = getattr(import_module("hf_moe.api"), name)
    return value


def __dir__() -> list[str]:
    """For completion in notebooks."""
    return sorted({*globals(), *vars(import_module("hf_moe.api"))})
