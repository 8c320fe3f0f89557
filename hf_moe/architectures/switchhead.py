"""SwitchHead: few attention heads, whose values and outputs are mixtures of experts (https://arxiv.org/abs/2312.07987).

Sizes are those of the training code (RobertCsordas/moe_attention, `sweeps/`). The paper's main models have
Transformer-XL's relative positions; these have the rotary ones of its RoPE models and of its released layer. They have
RMSNorm instead of LayerNorm.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class SwitchHeadConfig(DecoderConfig):
    """Attention experts beside a dense feed-forward. Defaults are the large RoPE model on WikiText-103 (243M).

    Args:
        num_attention_heads: attention heads, each with its own keys and values.
        num_attention_experts: value experts, and output experts, of each head.
        num_attention_experts_per_tok: how many of either a token uses in each head.
        rotary_fraction: share of each head that is rotated by position.
        attention_expert_dropout: probability, in training, that an attention expert is not to be chosen.
        intermediate_size: width of the dense feed-forward, which has no gate but biases.
        hidden_act: activation of the feed-forward.
        initializer_range: for everything outside the attention, which starts with 1 / sqrt(layers * inputs) as in the
            released code.

    Raises:
        ValueError: fewer key-value heads than heads; leave `num_key_value_heads` out.
    """

    model_type = "switchhead"
    block_pattern: ClassVar[tuple[str, ...]] = ("switchhead",)

    vocab_size: int = 8000
    hidden_size: int = 1024
    num_hidden_layers: int = 18
    num_attention_heads: int = 4
    head_dim: int | None = 100
    num_attention_experts: int = 4
    num_attention_experts_per_tok: int = 2
    rotary_fraction: float = 0.5
    attention_expert_dropout: float = 0.0
    intermediate_size: int = 4136
    hidden_act: str = "relu"
    max_position_embeddings: int = 1024

    def check_heads(self) -> None:
        super().check_heads()
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must be num_attention_heads="
                f"{self.num_attention_heads}: each head has keys and values of its own. Leave it out."
            )

    @classmethod
    def c4_262m(cls, **overrides: Any) -> "SwitchHeadConfig":
        """The large model on C4: 262M parameters with the paper's relative positions, 8M less without."""
        layout = {"head_dim": 112, "intermediate_size": 4188, "max_position_embeddings": 512}
        return cls(**{**layout, **overrides})

    @classmethod
    def c4_47m(cls, **overrides: Any) -> "SwitchHeadConfig":
        """The small model on C4: 47M parameters with the paper's relative positions, 1M less without."""
        layout = {"head_dim": 76, "intermediate_size": 2080, "max_position_embeddings": 256}
        return cls.small(**{**layout, **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> "SwitchHeadConfig":
        """The small RoPE model on WikiText-103."""
        layout = {
            "hidden_size": 412,
            "num_hidden_layers": 16,
            "num_attention_heads": 2,
            "head_dim": 64,
            "num_attention_experts": 5,
            "num_attention_experts_per_tok": 3,
            "intermediate_size": 2092,
            "max_position_embeddings": 512,
        }
        return cls(**{**layout, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "switch_head",
            "num_heads": self.num_attention_heads,
            "num_experts": self.num_attention_experts,
            "top_k": self.num_attention_experts_per_tok,
            "partial_rotary_factor": self.rotary_fraction,
            "expert_dropout": self.attention_expert_dropout,
            "init_scale": self.num_hidden_layers**-0.5,
        }
        feed_forward = {
            "type": "ungated_mlp",
            "intermediate_size": self.intermediate_size,
            "activation": self.hidden_act,
            "bias": True,
        }
        return {"switchhead": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


(
    SwitchHeadModel,
    SwitchHeadForCausalLM,
    SwitchHeadForSequenceClassification,
    SwitchHeadForTokenClassification,
) = model_classes("SwitchHead", SwitchHeadConfig)
