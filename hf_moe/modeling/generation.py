"""What `generate` must know about inputs that only some parts read."""

from typing import Any

from transformers import GenerationMixin

from .parts import Part


class PartsGenerationMixin(GenerationMixin):
    """`generate` takes what the parts of this model read (`Part.reads_inputs`), and no other unknown argument.

    Transformers compares its arguments with the signature of `forward`, which does not name what parts read.
    """

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        parts = [module for module in self.modules() if isinstance(module, Part)]
        read = {name for part in parts for name in part.reads_inputs}
        others = {name: value for name, value in model_kwargs.items() if name not in read}
        super()._validate_model_kwargs(others)  # pyright: ignore[reportAttributeAccessIssue]
