"""BlockFFN: experts that ReLU switches on, few at a time for a whole chunk (https://arxiv.org/abs/2507.08771).

The released models also multiply embeddings and the outputs of sublayers by constants (MiniCPM's 12 and 1.4 / sqrt of
the depth). Here those are part of the weights they multiply: the same functions, with other sizes of initial weights.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class BlockFfnConfig(DecoderConfig):
    """Many small experts without gates behind a ReLU router, with latent attention. Defaults are the paper's largest
    model: 1.2 B parameters without embeddings.

    Args:
        num_experts: experts per layer; how many a token uses is learned.
        moe_intermediate_size: width of one expert.
        activation_locality_loss_coef: weight of the loss that makes neighbouring tokens use the same experts: 2e-3 in
            the smaller models.
        chunk_sparsification_loss_coef: weight of the loss that makes a chunk use few experts. The paper starts with
            this one and adapts it.
        chunk_size: tokens of a chunk.
        q_lora_rank: width of the latent vector of the queries.
        kv_lora_rank: width of the latent vector that the cache holds.
        qk_nope_head_dim: entries of a query and key head without position.
        qk_rope_head_dim: entries with position; `head_dim` defaults to it.
        v_head_dim: entries of a value head.
        initializer_range: the released 0.1 / sqrt(hidden_size / 256).
    """

    model_type = "blockffn"
    block_pattern: ClassVar[tuple[str, ...]] = ("blockffn",)

    vocab_size: int = 122753
    hidden_size: int = 1792
    num_hidden_layers: int = 35
    num_attention_heads: int = 14
    num_experts: int = 56
    moe_intermediate_size: int = 128
    activation_locality_loss_coef: float | int = 0.001
    chunk_sparsification_loss_coef: float | int = 0.05
    chunk_size: int = 64
    q_lora_rank: int | None = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float | int = 0.0
    initializer_range: float = 0.0378

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.qk_rope_head_dim
        super().__post_init__(**kwargs)

    @classmethod
    def paper_100m(cls, **overrides: Any) -> "BlockFfnConfig":
        """The paper's small model, 0.1 B."""
        return cls(**{**cls.sizes(768, 16, 6, 48), "moe_intermediate_size": 64, **overrides})

    @classmethod
    def paper_500m(cls, **overrides: Any) -> "BlockFfnConfig":
        """The paper's medium model, 0.5 B."""
        return cls(**{**cls.sizes(1280, 27, 10, 40), **overrides})

    @classmethod
    def paper_800m(cls, **overrides: Any) -> "BlockFfnConfig":
        """The paper's large model, 0.8 B, with the released configuration's 48 experts."""
        return cls(**{**cls.sizes(1536, 32, 12, 48), **overrides})

    @staticmethod
    def sizes(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, num_experts: int) -> dict[str, Any]:
        """Fields in which the smaller models differ from the largest."""
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_experts": num_experts,
            "initializer_range": round(0.1 / (hidden_size / 256) ** 0.5, 4),
            "activation_locality_loss_coef": 0.002,
        }

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "latent_attention",
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rope_interleave": False,
        }
        router = {
            "type": "relu_norm",
            "eps": self.rms_norm_eps,
            "activation_locality_loss_coef": self.activation_locality_loss_coef,
            "chunk_sparsification_loss_coef": self.chunk_sparsification_loss_coef,
            "chunk_size": self.chunk_size,
        }
        experts = {"type": "mlp", "intermediate_size": self.moe_intermediate_size, "activation": self.hidden_act}
        feed_forward = {"type": "moe", "num_experts": self.num_experts, "router": router, "experts": experts}
        return {"blockffn": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


BlockFfnModel, BlockFfnForCausalLM, BlockFfnForSequenceClassification, BlockFfnForTokenClassification = model_classes(
    "BlockFfn", BlockFfnConfig
)
