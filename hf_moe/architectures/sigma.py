"""Sigma: DiffQKV attention, few key heads and strong queries (https://arxiv.org/abs/2501.13629).

With tied embeddings, which the paper does not mention, the 10B layout has 9.99 B parameters and the 1.5B layout 2.02 B
(1.53 B without the augmented queries): the two names do not count alike.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class SigmaConfig(DecoderConfig):
    """DiffQKV attention and SwiGLU. Defaults are Sigma-1.5B; `SigmaConfig.sigma_10b()` is the other published size.

    Args:
        num_key_heads: key heads.
        num_key_value_heads: value heads.
        key_head_dim: entries of a query and key head; None takes `head_dim`, as in the released models.
        query_size: width of the augmented queries' feed-forward, over all heads; None for plain queries.
        top_values: in evaluation, sum only the values of this many best keys (Sel.V-top100); None sums all.
        renormalize_values: weights of the selected values sum to one.
    """

    model_type = "sigma"
    block_pattern: ClassVar[tuple[str, ...]] = ("sigma",)
    default_theta: ClassVar[float] = 50000.0

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 26
    intermediate_size: int = 6144
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 16
    num_key_heads: int = 4
    key_head_dim: int | None = None
    query_size: int | None = 3072
    top_values: int | None = None
    renormalize_values: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def sigma_10b(cls, **overrides: Any) -> "SigmaConfig":
        """The published 10B layout; `overrides` are any fields."""
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "query_size": 6144}
        return cls(**{**sizes, "rope_theta": 500000.0, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "diff_qkv",
            "num_key_heads": self.num_key_heads,
            "key_head_dim": self.key_head_dim,
            "query_size": self.query_size,
            "top_values": self.top_values,
            "renormalize": self.renormalize_values,
        }
        feed_forward = {"type": "mlp", "intermediate_size": self.intermediate_size}
        return {"sigma": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


SigmaModel, SigmaForCausalLM, SigmaForSequenceClassification, SigmaForTokenClassification = model_classes(
    "Sigma", SigmaConfig
)
