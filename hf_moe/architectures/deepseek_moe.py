"""DeepSeekMoE: many small experts beside shared ones (https://arxiv.org/abs/2401.06066).

    y = x + sum_s FFN_s(x) + sum_{e in top-k(s)} s_e FFN_e(x),   s = softmax(W x) over the routed experts

The chosen scores are not renormalised. Sizes are those of the released DeepSeekMoE 16B.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class DeepseekMoeConfig(DecoderConfig):
    """Shared and fine-grained routed experts. Defaults are the 16B model: 16.4 B parameters, 2.8 B active.

    Args:
        intermediate_size: width of the dense feed-forward of the first layers.
        first_k_dense_replace: how many layers at the beginning are dense.
        moe_layer_freq: of the layers after them, those whose index is a multiple of this are sparse, the others dense.
        num_experts: routed experts (`n_routed_experts` in the released configuration).
        num_experts_per_tok: routed experts per token.
        num_shared_experts: experts that see every token (`n_shared_experts`); 0 for none.
        moe_intermediate_size: width of one expert.
        norm_topk_prob: divide the chosen scores by their sum; the paper does not.
        router_aux_loss_coef: weight of the expert-level balance loss (eq. 12 to 14), 1 at perfect balance.
        router_balance_loss: over each `sequence`, as the released configuration has it; `switch` is over the batch.
    """

    model_type = "deepseek_moe"

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    num_experts: int = 64
    num_experts_per_tok: int = 6
    num_shared_experts: int = 2
    moe_intermediate_size: int = 1408
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | int = 0.001
    router_balance_loss: str = "sequence"

    def validate_parts(self) -> None:
        if self.moe_layer_freq < 1:
            raise ValueError(f"moe_layer_freq={self.moe_layer_freq} must be 1 (every layer is sparse) or more.")
        super().validate_parts()

    @property
    def block_pattern(self) -> list[str]:
        """Dense layers first."""
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        layers = range(self.num_hidden_layers)
        return ["sparse" if layer >= first and layer % every == 0 else "dense" for layer in layers]

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        sparse = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
            "shared_intermediate_size": self.moe_intermediate_size if self.num_shared_experts else 0,
            "num_shared_experts": max(self.num_shared_experts, 1),
        }
        dense = {"type": "mlp", "intermediate_size": self.intermediate_size}
        mixer = {"type": "attention"}
        return {
            "dense": {"type": "pre_norm", "mixer": mixer, "feed_forward": dense},
            "sparse": {"type": "pre_norm", "mixer": mixer, "feed_forward": sparse},
        }


(
    DeepseekMoeModel,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
) = model_classes("DeepseekMoe", DeepseekMoeConfig)
