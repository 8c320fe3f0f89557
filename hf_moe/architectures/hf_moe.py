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

    @property
    def num_experts(self) -> int:
        """Routed experts of the first sparse block (0 if there is none), where other tools look for them."""
        return next((block["feed_forward"]["num_experts"] for block in self.sparse_blocks), 0)

    @property
    def num_experts_per_tok(self) -> int:
        """Experts per token of the first sparse block (0 if there is none)."""
        block = next(iter(self.sparse_blocks), None)
        return block["feed_forward"]["router"].get("top_k", self.num_experts) if block else 0

    @property
    def sparse_blocks(self) -> list[dict[str, Any]]:
        """The blocks that route, in the order of the pattern."""
        used = [self.blocks[name] for name in self.block_pattern]  # pyright: ignore - filled by __post_init__
        return [block for block in used if block.get("feed_forward", {}).get("type") == "moe"]


HfMoeModel, HfMoeForCausalLM, HfMoeForSequenceClassification, HfMoeForTokenClassification = model_classes(
    "HfMoe", HfMoeConfig
)
