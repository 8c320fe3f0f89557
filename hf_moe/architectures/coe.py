"""CoE: a chain of experts, each token through the same experts several times (https://arxiv.org/abs/2506.18945)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes

PLACEMENTS = ("pre_norm", "paper")


@strict
class CoeConfig(DecoderConfig):
    """Chain-of-Experts. Defaults are the paper's CoE-2 with top-4: four layers of DeepSeek-V2-Lite's shape, with
    multi-head latent attention, 63 routed experts and a shared one; 571.2M parameters beside the embeddings. Its
    README says "544MB", which agrees if M means 2^20 (544.75). Positions are plain rotary ones, not the code's YaRN.

    Args:
        num_experts: routed experts per layer.
        num_experts_per_tok: experts per token and iteration.
        num_iterations: how often a token passes through the experts; compute grows with it, parameters do not.
        moe_intermediate_size: width of one expert.
        num_shared_experts: experts that every token passes in every iteration.
        norm_topk_prob: divide the chosen probabilities by their sum.
        shared_router: one router for all iterations, which the paper finds worse.
        inner_residual: add what an iteration read to what it says; False is the paper's ablation.
        placement: `pre_norm` adds the chain's update to the residual stream, as every pre-norm model does; `paper`
            is the released code: the normed stream runs through the chain and the un-normed one ends in each layer.
        kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank: sizes of `latent_attention`.
    """

    model_type = "coe"
    block_pattern: ClassVar[tuple[str, ...]] = ("coe",)

    vocab_size: int = 102400
    hidden_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_experts: int = 63
    num_experts_per_tok: int = 4
    num_iterations: int = 2
    moe_intermediate_size: int = 704
    num_shared_experts: int = 1
    norm_topk_prob: bool = False
    shared_router: bool = False
    inner_residual: bool = True
    placement: str = "pre_norm"
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    router_aux_loss_coef: float | int = 0.001

    def validate_parts(self) -> None:
        """Also check how the chain stands in its layer."""
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement={self.placement!r} is unknown; choose from {list(PLACEMENTS)}.")
        super().validate_parts()

    @classmethod
    def paper_coe_2(cls, **overrides: Any) -> "CoeConfig":
        """The paper's model: two iterations with four of 63 experts each, in the released code's placement."""
        return cls(**{"placement": "paper", **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        feed_forward = {
            "type": "chain_of_experts",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob},
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
            "num_iterations": self.num_iterations,
            "inner_residual": self.inner_residual,
            "include_input": self.placement == "paper",
            "shared_router": self.shared_router,
            "shared_intermediate_size": self.num_shared_experts * self.moe_intermediate_size,
        }
        mixer = {"type": "latent_attention", **{name: getattr(self, name) for name in sizes}}
        kind = "own_residual" if self.placement == "paper" else "pre_norm"
        return {"coe": {"type": kind, "mixer": mixer, "feed_forward": feed_forward}}


CoeModel, CoeForCausalLM, CoeForSequenceClassification, CoeForTokenClassification = model_classes("Coe", CoeConfig)
