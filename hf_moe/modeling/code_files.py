"""The Python file that a saved model carries, so that `trust_remote_code=True` finds its classes.

Either a stub, which imports them from this package, or, with `self_contained=True`, the whole architecture in one
flat file that needs torch and transformers only. This module is part of that flat file, and there hands on the file.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUB = "modeling_hf_moe"
STANDALONE = "modeling_standalone"
AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
CARRIED: dict[type, tuple[type, ...]] = {}  # config class -> its classes, in the order of `AUTO_CLASSES`
# the imports stand inside `try`, or Transformers' own check would answer before our message does
STUB_TEXT = '''"""Loads the classes of this model from the installed package: `pip install hf_moe`."""

try:
    from {package} import (
{names}
    )
except ImportError as error:
    raise ImportError("This model needs the package hf_moe: run `pip install hf_moe`.") from error
'''


def stub(config: Any) -> str:
    """A file that imports the classes of a config."""
    classes = CARRIED[type(config)]
    package = ".".join(classes[0].__module__.split(".")[:2])  # hf_moe.architectures; files inside it may move
    return STUB_TEXT.format(package=package, names="\n".join(f"        {each.__name__}," for each in classes))


WRITERS: dict[str, Callable[[Any], str]] = {STUB: stub}  # file name -> its text; hf_moe adds the flat one


class CarriesCode:
    """First base of configs: Transformers must not copy our sources into a folder.

    The loader of a repository with code calls `register_for_auto_class`, after which saving would copy the file of the
    class, without what it imports, and point `auto_map` at it.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: a config of ours writes `auto_map` and the file itself."""


class ModelWithCode(CarriesCode):
    """First base of models: saves and pushes the file that its config names."""

    config: Any

    def save_pretrained(
        self, save_directory: Any, *args: Any, self_contained: bool | None = None, **kwargs: Any
    ) -> None:
        """As in Transformers, with a code file for `trust_remote_code=True` beside the weights.

        Args:
            save_directory: the folder.
            self_contained: True writes the architecture as one flat file, which needs no hf_moe; False a stub that
                imports hf_moe; None what the model was loaded with, a stub for a new one.
        """
        choose_code(self.config, self_contained)
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def push_to_hub(self, *args: Any, self_contained: bool | None = None, **kwargs: Any) -> str:
        """As in Transformers, with `self_contained` as in `save_pretrained`."""
        choose_code(self.config, self_contained)
        return super().push_to_hub(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def choose_code(config: Any, self_contained: bool | None) -> None:
    """Settle which file a config's folders carry from now on; None leaves it as it is.

    Raises:
        ValueError: a subclass of ours, whose code we do not know.
    """
    if self_contained is None:
        return
    if type(config) not in CARRIED:
        raise ValueError(f"{type(config).__name__} is not a class of hf_moe: its code cannot be written to one file.")
    config.auto_map = auto_map(config, STANDALONE if self_contained else STUB)


def auto_map(config: Any, file: str) -> dict[str, str]:
    """What config.json says about a file: name of an Auto class -> file.class."""
    return {auto: f"{file}.{each.__name__}" for auto, each in zip(AUTO_CLASSES, CARRIED[type(config)])}


def carry_code(config: Any, folder: str | Path) -> None:
    """Write the file into a folder and its name into the config; a subclass of somebody else's carries nothing."""
    if type(config) not in CARRIED:
        return
    chosen = (getattr(config, "auto_map", None) or {}).get("AutoConfig", STUB)
    file = chosen.split("--")[-1].partition(".")[0]
    if __name__.startswith("hf_moe."):
        if file == STANDALONE:
            importlib.import_module("hf_moe.api")  # adds its writer, which modeling may not know
        file = file if file in WRITERS else STUB
        text = WRITERS[file](config)
    else:  # a flat file
        own = sys.modules[__name__].__file__
        assert own is not None
        file, text = Path(own).stem, Path(own).read_text(encoding="utf-8")
    config.auto_map = auto_map(config, file)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{file}.py").write_text(text, encoding="utf-8")
    for stale in {STUB, STANDALONE} - {file}:
        Path(folder, f"{stale}.py").unlink(missing_ok=True)
