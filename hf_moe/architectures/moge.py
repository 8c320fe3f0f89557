"""Pangu Pro MoE: a mixture of grouped experts (https://arxiv.org/abs/2505.21411)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class MogeConfig(DecoderConfig):
    """Equally many experts from every group, beside shared ones. Defaults are Pangu Pro MoE's: 72 B parameters, 16.5 B
    active.

    Args:
        num_experts: routed experts.
        num_experts_per_tok: routed experts per token, a multiple of the groups.
        num_expert_groups: groups of consecutive experts; one group per device balances the devices.
        moe_intermediate_size: width of one expert.
        num_shared_experts: experts that see every token; 0 for none.
        learned_router_scale: multiply each expert's weight by a learned number, as the released weights do. The paper
            does not mention it.
        attention_bias: biases on the four projections of the attention.
    """

    model_type = "moge"
    block_pattern: ClassVar[tuple[str, ...]] = ("moge",)

    vocab_size: int = 153376
    hidden_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    num_experts: int = 64
    num_experts_per_tok: int = 8
    num_expert_groups: int = 8
    moe_intermediate_size: int = 1344
    num_shared_experts: int = 4
    learned_router_scale: bool = False
    attention_bias: bool = True

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        router = {
            "type": "grouped_top_k",
            "top_k": self.num_experts_per_tok,
            "num_groups": self.num_expert_groups,
            "learned_scale": self.learned_router_scale,
        }
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": router,
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
            "shared_intermediate_size": self.moe_intermediate_size if self.num_shared_experts else 0,
            "num_shared_experts": max(self.num_shared_experts, 1),
        }
        mixer = {"type": "attention", "qkv_bias": self.attention_bias, "output_bias": self.attention_bias}
        return {"moge": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


MogeModel, MogeForCausalLM, MogeForSequenceClassification, MogeForTokenClassification = model_classes(
    "Moge", MogeConfig
)
