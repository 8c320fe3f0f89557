"""MoLE: a mixture of latent experts, which share their input projection in groups (https://arxiv.org/abs/2503.23100)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class MoleConfig(DecoderConfig):
    """Mixture of latent experts. Defaults have the shape of Qwen1.5-MoE's routed experts, which the paper converts.

    Args:
        num_experts: experts per layer.
        num_experts_per_tok: experts per token.
        moe_intermediate_size: width of one expert.
        latent_size: width of the space that the experts of a group share. Defaults to `moe_intermediate_size`.
        experts_per_group: consecutive experts that share a projection.
        factorize_down: also share the output projection inside a group (the paper's second version, MoLAE).
        norm_topk_prob: divide the chosen probabilities by their sum.
    """

    model_type = "mole"
    block_pattern: ClassVar[tuple[str, ...]] = ("mole",)

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    latent_size: int | None = None
    experts_per_group: int = 10
    factorize_down: bool = False
    norm_topk_prob: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.latent_size is None:
            self.latent_size = self.moe_intermediate_size
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        experts = {
            "type": "latent",
            "intermediate_size": self.moe_intermediate_size,
            "latent_size": self.latent_size,
            "experts_per_group": self.experts_per_group,
            "factorize_down": self.factorize_down,
        }
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": experts,
        }
        return {"mole": {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}}


MoleModel, MoleForCausalLM, MoleForSequenceClassification, MoleForTokenClassification = model_classes(
    "Mole", MoleConfig
)
