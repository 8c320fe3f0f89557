"""Ling 2.0: many small experts, chosen by biased sigmoid scores from groups (https://arxiv.org/abs/2510.22115).

Fields are called as in the released configurations (`bailing_moe_v2`), except that the rotated half of each head is
`rotary_fraction`; `partial_rotary_factor` is accepted too. Balance comes from the selection bias, which a callback of
`hf_moe.training` has to move in training.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.model import model_classes
from ..modeling.multi_token_prediction import MultiTokenConfig, MultiTokenForCausalLM


@strict
class LingConfig(MultiTokenConfig):
    """Defaults are Ling-mini-2.0 with its prediction layer, which the released checkpoints leave out.

    Args:
        intermediate_size: width of the dense feed-forward of the first layers.
        first_k_dense_replace: how many layers at the beginning are dense.
        num_experts: routed experts.
        num_experts_per_tok: experts per token.
        num_shared_experts: experts beside them that see every token; 0 for none.
        moe_intermediate_size: width of one expert.
        n_group: groups of consecutive experts.
        topk_group: groups that a token's experts may be from.
        norm_topk_prob: divide the chosen scores by their sum.
        routed_scaling_factor: what the weights are multiplied by in the end.
        moe_router_enable_expert_bias: add a bias to the scores for the choice, balancing without a loss.
        rotary_fraction: share of each head that is rotated by position, from its first entry on.
        use_qk_norm: normalise each head's query and key before the rotation.
        use_qkv_bias: biases on the query, key and value projections.
        use_bias: a bias on the attention's output projection.
    """

    model_type = "ling"
    default_theta: ClassVar[float] = 600000.0

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    first_k_dense_replace: int = 1
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    moe_router_enable_expert_bias: bool = True
    rotary_fraction: float | int = 0.5
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 3.5e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.rotary_fraction = kwargs.pop("partial_rotary_factor", self.rotary_fraction)
        super().__post_init__(**kwargs)

    @classmethod
    def ling_mini(cls, **overrides: Any) -> "LingConfig":
        """Ling-mini-2.0 as released, without prediction layer: 16 B parameters, 1.4 B active."""
        return cls(**{"num_nextn_predict_layers": 0, **overrides})

    @classmethod
    def ling_flash(cls, **overrides: Any) -> "LingConfig":
        """Ling-flash-2.0: 103 B parameters, 6.1 B active."""
        sizes = {"hidden_size": 4096, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 32}
        return cls.ling_mini(**{**sizes, "moe_intermediate_size": 1024, **overrides})

    @classmethod
    def ling_1t(cls, **overrides: Any) -> "LingConfig":
        """Ling-1T: a trillion parameters, 51 B active."""
        sizes = {"hidden_size": 8192, "intermediate_size": 18432, "num_hidden_layers": 80, "num_attention_heads": 64}
        own = {"num_key_value_heads": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 4}
        return cls.ling_mini(**{**sizes, **own, **overrides})

    @property
    def block_pattern(self) -> list[str]:
        """Dense layers first."""
        dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        return ["dense"] * dense + ["sparse"] * (self.num_hidden_layers - dense)

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {
            "type": "attention",
            "qk_norm": self.use_qk_norm,
            "qkv_bias": self.use_qkv_bias,
            "output_bias": self.use_bias,
            "partial_rotary_factor": self.rotary_fraction,
        }
        router = {
            "type": "top_k",
            "top_k": self.num_experts_per_tok,
            "normalize": self.norm_topk_prob,
            "scoring": "sigmoid",
            "selection_bias": self.moe_router_enable_expert_bias,
            "scale": self.routed_scaling_factor,
            "num_groups": self.n_group,
            "groups_per_token": self.topk_group,
        }
        sparse = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": router,
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
            "shared_intermediate_size": self.moe_intermediate_size if self.num_shared_experts else 0,
            "num_shared_experts": max(self.num_shared_experts, 1),
        }
        dense = {"type": "mlp", "intermediate_size": self.intermediate_size}
        return {
            "dense": {"type": "pre_norm", "mixer": mixer, "feed_forward": dense},
            "sparse": {"type": "pre_norm", "mixer": mixer, "feed_forward": sparse},
        }


LingModel, LingForCausalLM, LingForSequenceClassification, LingForTokenClassification = model_classes(
    "Ling", LingConfig, MultiTokenForCausalLM
)
