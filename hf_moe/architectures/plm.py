"""PLM, the peripheral language model: latent attention and squared ReLU, dense (https://arxiv.org/abs/2503.12167).

Sizes are those of the authors' configuration of PLM-1.8B; names of parameters are theirs, so that its checkpoints load
with `PlmForCausalLM.from_pretrained`. `model_type` is not their "plm", which elsewhere means protein language models.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class PlmConfig(DecoderConfig):
    """Multi-head latent attention and an ungated feed-forward `W_down relu(W_up x)^2`. Defaults are PLM-1.8B.

    Args:
        kv_lora_rank: width of the latent vector that the cache holds.
        q_lora_rank: width of a latent vector of the queries; None projects them directly.
        qk_nope_head_dim: entries of a query and key head without position.
        qk_rope_head_dim: entries with position; `head_dim` defaults to it, as in Transformers' DeepSeek models.
        v_head_dim: entries of a value head.
        rope_interleave: rotated pairs are neighbours.
        hidden_act: activation of the feed-forward.
    """

    model_type = "peripheral_lm"
    block_pattern: ClassVar[tuple[str, ...]] = ("plm",)
    default_theta: ClassVar[float] = 100000.0

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 32
    intermediate_size: int = 8192
    num_attention_heads: int = 16
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    hidden_act: str = "relu2"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.qk_rope_head_dim
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "latent_attention",
            "kv_lora_rank": self.kv_lora_rank,
            "q_lora_rank": self.q_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rope_interleave": self.rope_interleave,
        }
        feed_forward = {
            "type": "ungated_mlp",
            "intermediate_size": self.intermediate_size,
            "activation": self.hidden_act,
        }
        return {"plm": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


PlmModel, PlmForCausalLM, PlmForSequenceClassification, PlmForTokenClassification = model_classes("Plm", PlmConfig)
