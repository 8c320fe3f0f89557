"""WideNet: wider instead of deeper, one attention and one MoE at all depths (https://arxiv.org/abs/2107.11817).

The paper trains vision transformers and a masked language model. This is its layer in a decoder: RMSNorm instead of
LayerNorm, rotary instead of learned positions, no noise on the router's logits, and no capacity limit: no token is
dropped.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class WideNetConfig(DecoderConfig):
    """One attention and one mixture of experts, reused at every depth with norms of its own. Defaults: depth,
    width and heads of the base model of its code (ViT-B), and four experts; their width of 4096 is ours, chosen so
    that the 27.6M parameters that all depths share come near to the paper's total as we recall it (29M).

    Args:
        num_experts: experts of the one layer.
        num_experts_per_tok: experts per token (the paper: 1 or 2).
        moe_intermediate_size: width of one expert.
        expert_activation: of the experts, which have no gate.
        expert_bias: biases in the experts; experts with biases are not sharded by tensor or expert parallelism.
        norm_topk_prob: divide the chosen probabilities by their sum; the released code does not.
    """

    model_type = "widenet"
    block_pattern: ClassVar[tuple[str, ...]] = ("widenet",)

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 4096
    expert_activation: str = "gelu"
    expert_bias: bool = True
    norm_topk_prob: bool = False
    attention_bias: bool = True

    @classmethod
    def large(cls, **overrides: Any) -> "WideNetConfig":
        """24 layers of width 1024, as ViT-L; the experts' width is again ours."""
        return cls(**{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": {
                "type": "mlp",
                "intermediate_size": self.moe_intermediate_size,
                "activation": self.expert_activation,
                "bias": self.expert_bias,
            },
        }
        mixer = {"type": "attention", "qkv_bias": self.attention_bias, "output_bias": self.attention_bias}
        return {"widenet": {"type": "widenet", "mixer": mixer, "feed_forward": feed_forward}}


WideNetModel, WideNetForCausalLM, WideNetForSequenceClassification, WideNetForTokenClassification = model_classes(
    "WideNet", WideNetConfig
)
