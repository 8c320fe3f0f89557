"""What `import hf_moe` does at once: Transformers learns our model types, and imports their classes when one is used.

Importing all classes takes twice as long as `from transformers import AutoModelForCausalLM`; a program that imports us
for its plugins, and loads another model, should not pay for that.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPES = frozenset(
    {
        *("bam", "based", "blockffn", "coe", "deepseek_moe", "dynamic_moe", "hf_moe", "ling", "moa", "moe_x", "moge"),
        *("mole", "monet", "peer", "peripheral_lm", "rexmoe", "rmoe", "sigma", "smoe_dropout", "switchhead", "thor"),
        *("ultramem", "widenet"),
        *(
            "bailing_moe",
            "bailing_moe_linear",
            "deepseek",
            "llama_moe",
            "PanguProMoE",
            "time_moe",
        ),  # public checkpoints
    }
)


class ConfigTypes(dict[str, type]):
    """The config classes that others registered with Transformers; ours are imported when one is looked up."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or model_type in MODEL_TYPES

    def __getitem__(self, model_type: str) -> type:
        if not super().__contains__(model_type) and model_type in MODEL_TYPES:
            importlib.import_module("hf_moe.api")  # which registers them
        return super().__getitem__(model_type)


def watch_config_types() -> None:
    """Let Transformers' table of config classes know our types; what had one of their names before gives way."""
    others = {name: each for name, each in CONFIG_MAPPING._extra_content.items() if name not in MODEL_TYPES}
    CONFIG_MAPPING._extra_content = ConfigTypes(others)  # a dict, as far as Transformers can tell


def after_import(name: str, action: Callable[[], None]) -> None:
    """Do something as soon as a module was imported, or now if it was."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, Watch(name, action))


class Watch(MetaPathFinder):
    """Waits for the import of one module, once."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The module's spec, with an action behind its loader; None for every other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenDo(spec.loader, self.action)
        return spec


class ThenDo(Loader):
    """Loads a module as its own loader does, then does something."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: Any) -> Any:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then the action."""
        self.loader.exec_module(module)
        self.action()

    def __getattr__(self, name: str) -> Any:
        """What else the loader can do, such as `get_source`."""
        return getattr(self.loader, name)
