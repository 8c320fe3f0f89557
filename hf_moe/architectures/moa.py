"""MoA: each token chooses its attention heads (https://arxiv.org/abs/2210.05144).

The paper trains encoder-decoders for translation, and masked language models. This is its layer in a decoder: normed
before each half instead of after (by RMSNorm instead of LayerNorm), rotary positions instead of sinusoids.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class MoaConfig(DecoderConfig):
    """Mixture of attention heads. Sizes of the model and losses are the released code's. Its script uses all 8 of 8
    experts (`MoaConfig.base`); the defaults here choose, 16 of 32 of width 256.

    Args:
        num_attention_heads: query heads that a token uses: its experts times the heads of one expert.
        num_key_value_heads: heads of one expert, and of the keys and values that all share; 1 in MoA. A token has
            `num_attention_heads // num_key_value_heads` experts.
        num_attention_experts: experts to choose from.
        norm_topk_prob: divide the chosen probabilities by their sum: the paper and JetMoE do, the released code does
            not.
        attention_output_bias: a bias on the mixed output, as in JetMoE.
        intermediate_size: width of the dense feed-forward, which has no gate but biases.
        hidden_act: activation of the feed-forward.
    """

    model_type = "moa"
    block_pattern: ClassVar[tuple[str, ...]] = ("moa",)

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 1
    head_dim: int | None = 256
    num_attention_experts: int = 32
    norm_topk_prob: bool = False
    attention_output_bias: bool = False
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    tie_word_embeddings: bool = True
    router_z_loss_coef: float | int = 0.001

    @classmethod
    def base(cls, **overrides: Any) -> "MoaConfig":
        """The model of the released script: all 8 of 8 experts, of width 128, for every token."""
        return cls(**{"num_attention_heads": 8, "head_dim": 128, "num_attention_experts": 8, **overrides})

    @property
    def num_attention_experts_per_tok(self) -> int:
        """Attention experts that a token uses."""
        return self.num_attention_heads // (self.num_key_value_heads or self.num_attention_heads)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        router = {
            "type": "top_k",
            "top_k": self.num_attention_experts_per_tok,
            "normalize": self.norm_topk_prob,
        }
        mixer = {
            "type": "mixture_of_attention",
            "num_experts": self.num_attention_experts,
            "heads_per_expert": self.num_key_value_heads,
            "router": router,
            "output_bias": self.attention_output_bias,
        }
        feed_forward = {
            "type": "ungated_mlp",
            "intermediate_size": self.intermediate_size,
            "activation": self.hidden_act,
            "bias": True,
        }
        return {"moa": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


MoaModel, MoaForCausalLM, MoaForSequenceClassification, MoaForTokenClassification = model_classes("Moa", MoaConfig)
