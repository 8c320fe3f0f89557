"""SMoE-Dropout: a frozen random router and more and more experts per token (https://arxiv.org/abs/2303.01610).

The paper trains Transformer-XL, BERT and RoBERTa. This is its feed-forward in a decoder with RMSNorm and rotary
positions.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class SmoeDropoutConfig(DecoderConfig):
    """Experts that are dropped at random, less and less. Defaults are the released enwik8 script's model, on
    characters.

    Args:
        num_experts: experts per layer.
        num_experts_per_tok: experts per token where nothing else is said; all of them are the dense model. In training
            `hf_moe.training.TopKSchedule` lets the number grow (the script's 8 to 16); afterwards each router's
            attribute `top_k` may be set to what a device can afford.
        moe_intermediate_size: width of one expert, which has no gate but biases.
    """

    model_type = "smoe_dropout"
    block_pattern: ClassVar[tuple[str, ...]] = ("smoe_dropout",)

    vocab_size: int = 204
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    head_dim: int | None = 64
    num_experts: int = 16
    num_experts_per_tok: int = 16
    moe_intermediate_size: int = 512
    hidden_act: str = "relu"
    max_position_embeddings: int = 512

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "frozen", "top_k": self.num_experts_per_tok},
            "experts": {
                "type": "mlp",
                "intermediate_size": self.moe_intermediate_size,
                "activation": self.hidden_act,
                "bias": True,
            },
        }
        return {"smoe_dropout": {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}}


(
    SmoeDropoutModel,
    SmoeDropoutForCausalLM,
    SmoeDropoutForSequenceClassification,
    SmoeDropoutForTokenClassification,
) = model_classes("SmoeDropout", SmoeDropoutConfig)
