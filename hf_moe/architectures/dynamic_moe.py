"""Dynamic MoE: harder tokens use more experts (https://arxiv.org/abs/2403.07652)."""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class DynamicMoeConfig(DecoderConfig):
    """Each token uses the fewest experts whose probabilities exceed a threshold together. Field names and the defaults
    of routing are the released code's, sizes the paper's, as far as we know them (`DynamicMoeConfig.paper_3b`).

    Args:
        intermediate_size: width of one expert, and of the dense feed-forward of the layers between.
        num_experts: experts of a sparse layer.
        expert_frequency: layers whose index is a multiple of this are sparse, the others dense.
        top_p_threshold: the sum of probabilities that a token's experts have to exceed.
        router_entropy_loss_coef: weight of the entropy of the routing, the paper's beta, whose value and that of
            `router_aux_loss_coef` we remember and could not check. The balance loss sees the
            share of all assignments that an expert got, so that it does not grow with their number per token.
    """

    model_type = "dynamic_moe"

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    num_experts: int = 16
    expert_frequency: int = 2
    top_p_threshold: float | int = 0.4
    router_aux_loss_coef: float | int = 0.01
    router_entropy_loss_coef: float | int = 0.0001

    @classmethod
    def paper_3b(cls, **overrides: Any) -> "DynamicMoeConfig":
        """The paper's models of 3.5 B parameters, of which two experts per token would use 581 M: sparse everywhere.

        The released code does not tell these sizes. They come from memory, but fit all figures of the paper that we
        remember, those of the dense model with 374 M too.
        """
        return cls(**{"expert_frequency": 1, **overrides})

    def validate_parts(self) -> None:
        if self.expert_frequency < 1:
            raise ValueError(f"expert_frequency={self.expert_frequency} must be 1 (every layer is sparse) or more.")
        super().validate_parts()

    @property
    def block_pattern(self) -> list[str]:
        """The first layer is sparse."""
        return ["sparse"] + ["dense"] * (self.expert_frequency - 1)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        router = {
            "type": "top_p",
            "p": self.top_p_threshold,
            "entropy_loss_coef": self.router_entropy_loss_coef,
        }
        sparse = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": router,
            "experts": {"type": "swiglu", "intermediate_size": self.intermediate_size},
        }
        dense = {"type": "mlp", "intermediate_size": self.intermediate_size}
        mixer = {"type": "attention"}
        return {
            "sparse": {"type": "pre_norm", "mixer": mixer, "feed_forward": sparse},
            "dense": {"type": "pre_norm", "mixer": mixer, "feed_forward": dense},
        }


(
    DynamicMoeModel,
    DynamicMoeForCausalLM,
    DynamicMoeForSequenceClassification,
    DynamicMoeForTokenClassification,
) = model_classes("DynamicMoe", DynamicMoeConfig)
