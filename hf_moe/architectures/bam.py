"""BAM: dense specialists mixed with their attention, not only their feed-forwards (https://arxiv.org/abs/2408.08274).

Block, with h = norm(x):   y = x + sum_e g_e A_e(h) + sum_{k in top} p_k FFN_k(h)
g = softmax over all attention experts; p = softmax over all feed-forward experts, not renormalised over the chosen.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class BamConfig(DecoderConfig):
    """Branch-Attend-Mix. `intermediate_size` is the width of one expert: the paper's "4096" is gate and up together.

    Args:
        block_type: `parallel` (the paper's: attention and feed-forward read one normed input) or `pre_norm`, which
            takes Llama-style dense models without changing their residual layout.
        num_experts: feed-forward experts.
        num_experts_per_tok: feed-forward experts per token (the paper's top-1).
        num_attention_experts: attention experts, all active for every token. Defaults to `num_experts`.
        share_key_value: one set of keys and values for all attention experts (a smaller cache).
        norm_topk_prob: divide the chosen probabilities by their sum. False in the paper: with top-1 it would leave the
            router without a gradient.
        qk_norm: RMSNorm on queries and keys, per attention expert (Qwen3 sources).
        qkv_bias: biases on queries, keys and values (Qwen2 sources).
        sliding_window: if set, attention looks back on that many tokens (Mistral sources).
        router_z_loss_coef: the paper has a z-loss but not its weight; 0.001 is ST-MoE's and JetMoE's.
    """

    model_type = "bam"
    block_pattern: ClassVar[tuple[str, ...]] = ("bam",)

    hidden_size: int = 1024
    num_hidden_layers: int = 6
    intermediate_size: int = 2048
    block_type: str = "parallel"
    num_experts: int = 4
    num_experts_per_tok: int = 1
    num_attention_experts: int | None = None
    share_key_value: bool = False
    norm_topk_prob: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    router_z_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_experts is None:
            self.num_attention_experts = self.num_experts
        super().__post_init__(**kwargs)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "soft_mixture_of_attention",
            "num_experts": self.num_attention_experts,
            "share_key_value": self.share_key_value,
            "qk_norm": self.qk_norm,
            "qkv_bias": self.qkv_bias,
            "sliding": self.sliding_window is not None,
        }
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": {"type": "swiglu", "intermediate_size": self.intermediate_size},
        }
        return {"bam": {"type": self.block_type, "mixer": mixer, "feed_forward": feed_forward}}


BamModel, BamForCausalLM, BamForSequenceClassification, BamForTokenClassification = model_classes("Bam", BamConfig)
