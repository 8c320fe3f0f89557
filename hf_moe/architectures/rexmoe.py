"""ReXMoE: neighbouring layers reuse each other's experts (https://arxiv.org/abs/2510.17483)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class RexMoeConfig(DecoderConfig):
    """Experts in pools of several layers. Defaults have the sizes that we know of the paper's 2.3B model: 64 experts
    of 744 per layer of width 512, four layers to a pool. Heads, experts per token and vocabulary are ours, and so is
    the depth, which fits the total and the paper's largest pool of 32 layers.

    Args:
        num_experts: experts that each layer brings. Its router chooses among `layers_per_pool` times as many.
        num_experts_per_tok: experts per token.
        moe_intermediate_size: width of one expert.
        layers_per_pool: consecutive layers that share their experts; divides `num_hidden_layers`. 1 is a plain MoE.
        candidate_masking: which experts are masked while the candidates grow in training: `random` or `own_first`.
        norm_topk_prob: divide the chosen probabilities by their sum.
    """

    model_type = "rexmoe"
    block_pattern: ClassVar[tuple[str, ...]] = ("rexmoe",)

    hidden_size: int = 512
    num_hidden_layers: int = 32
    num_attention_heads: int = 8
    num_experts: int = 64
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 744
    layers_per_pool: int = 4
    candidate_masking: str = "random"
    norm_topk_prob: bool = False

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feed_forward = {
            "type": "pooled_moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
            "layers_per_pool": self.layers_per_pool,
            "masking": self.candidate_masking,
        }
        return {"rexmoe": {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}}


RexMoeModel, RexMoeForCausalLM, RexMoeForSequenceClassification, RexMoeForTokenClassification = model_classes(
    "RexMoe", RexMoeConfig
)
