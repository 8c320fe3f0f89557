"""The options that every method has: which modules it adapts, by PEFT's rules."""

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from .peft_types import add_peft_type


@dataclass
class TargetsConfig(PeftConfig):
    """Options of all methods that adapt modules by name; methods add theirs.

    Args:
        target_modules: names or a pattern of modules, as in LoRA. Default: PEFT's linear layers for the model type.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in LoRA.
    """

    method: ClassVar[str] = ""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules that train whole."})
    bias: str = field(default="none", metadata={"help": "Not used; PEFT asks for it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(self.method)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue] - as PEFT's
