"""MoE-X: few active units in wide ReLU experts, so that each can be understood (https://arxiv.org/abs/2503.07639).

The paper trains GPT-2s. This is its feed-forward in a decoder with RMSNorm and rotary positions.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class MoeXConfig(DecoderConfig):
    """Sparsity-aware routing to ReLU experts. Defaults have the shape of the paper's small model: GPT-2 small with 8
    experts of 2048, 2 of them active.

    Args:
        num_experts: experts per layer.
        num_experts_per_tok: experts per token: those whose units it is predicted to activate least.
        moe_intermediate_size: width of one expert, which has no gate and no biases.
    """

    model_type = "moe_x"
    block_pattern: ClassVar[tuple[str, ...]] = ("moe_x",)

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 2048
    hidden_act: str = "relu"
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True

    @classmethod
    def medium(cls, **overrides: Any) -> "MoeXConfig":
        """The shape of the paper's medium model: GPT-2 medium with the same experts."""
        return cls(**{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "sparsity_aware", "top_k": self.num_experts_per_tok},
            "experts": {
                "type": "mlp",
                "intermediate_size": self.moe_intermediate_size,
                "activation": self.hidden_act,
            },
        }
        return {"moe_x": {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}}


MoeXModel, MoeXForCausalLM, MoeXForSequenceClassification, MoeXForTokenClassification = model_classes(
    "MoeX", MoeXConfig
)
