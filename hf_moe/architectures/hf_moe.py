"""Free composition: name your blocks, and the order in which they repeat over the depth."""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.blocks import BLOCKS
from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes
from ..modeling.parts import resolve


@strict
class HfMoeConfig(DecoderConfig):
    """A decoder put together from parts.

    Args:
        blocks: name -> spec of a block, e.g. `{"moe": {"type": "pre_norm", "mixer": {"type": "attention"},
            "feed_forward": {"type": "moe", "num_experts": 8, "router": {"type": "top_k", "top_k": 2},
            "experts": {"type": "swiglu", "intermediate_size": 512}}}}`. A block's type defaults to `pre_norm`; every
            other default is written out, so that a later change of defaults never changes a saved model. The default
            is one dense Llama-like block.
        block_pattern: names in the order of the layers, repeated to `num_hidden_layers`. Defaults to all, in order.
    """

    model_type = "hf_moe"

    blocks: dict[str, dict] | None = None
    block_pattern: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        feed_forward = {"type": "mlp", "intermediate_size": 4 * self.hidden_size}
        blocks = self.blocks or {"dense": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}}
        self.blocks = {name: resolve(BLOCKS, {"type": "pre_norm", **block}) for name, block in blocks.items()}
        self.block_pattern = self.block_pattern or list(self.blocks)
        super().__post_init__(**kwargs)


HfMoeModel, HfMoeForCausalLM, HfMoeForSequenceClassification, HfMoeForTokenClassification = model_classes(
    "HfMoe", HfMoeConfig
)
