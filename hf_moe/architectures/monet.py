"""Monet: 262,144 small experts in every layer, for each to mean one thing (https://arxiv.org/abs/2412.04139).

Fields and saved names of weights are those of the public checkpoints (huggingface.co/MonetLLM; code: dmis-lab/Monet),
which load with `AutoModelForCausalLM.from_pretrained` and no code of theirs. In memory a layer's experts are
`mlp.expert_grid` and its router, which every fourth layer has, `mlp.gate`.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class MonetConfig(DecoderConfig):
    """Llama's attention and Monet's experts. Defaults are Monet-VD 1.4B (Table 6).

    Args:
        moe_dim: hidden width of one expert.
        moe_heads: heads of the router.
        moe_experts: experts per side; a layer has their square.
        moe_topk: how many of a side's experts a head keeps, on average (not in the paper; from the public code).
        moe_groups: layers that share one routing; the first of them has the router.
        moe_decompose: how experts are put together from halves: `vertical` or `horizontal`.
        hidden_act: activation of the experts.
        attention_bias: biases on the projections of the attention.
        output_router_probs: the public code's name for `output_router_logits`. Our logits are -1e10 for what is not
            kept; `logits.unflatten(-1, (2, moe_heads, moe_experts)).softmax(-1)` are its `router_probs`.
        uniformity_loss_coef, ambiguity_loss_coef: weights of the paper's two losses (lambda), of each router. They
            replace a balance loss: `router_aux_loss_coef` and `router_z_loss_coef` have nothing to weigh.
    """

    model_type = "monet"
    published_names: ClassVar[dict[str, str]] = {"moe.": "mlp.expert_grid.", "router.": "mlp.gate."}

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    moe_dim: int = 16
    moe_heads: int = 8
    moe_experts: int = 512
    moe_topk: int = 32
    moe_groups: int = 4
    moe_decompose: str = "vertical"
    output_router_probs: bool = False
    uniformity_loss_coef: float | int = 0.001
    ambiguity_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        self.output_router_logits = self.output_router_logits or self.output_router_probs
        super().__post_init__(**kwargs)

    @classmethod
    def monet_850m(cls, **overrides: Any) -> "MonetConfig":
        """850M parameters (Table 6), in either decomposition."""
        layout = {"hidden_size": 1536, "num_attention_heads": 12, "moe_dim": 12, "moe_heads": 6}
        return cls(**{**layout, **overrides})

    @classmethod
    def monet_1b4(cls, **overrides: Any) -> "MonetConfig":
        """1.4B parameters (Table 6; 1.465B in Table 8), in either decomposition."""
        return cls(**overrides)

    @classmethod
    def monet_4b1(cls, **overrides: Any) -> "MonetConfig":
        """4.1B parameters (Table 6), in either decomposition."""
        layout = {
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "moe_dim": 24,
            "moe_heads": 12,
        }
        return cls(**{**layout, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        mixer = {"type": "attention", "qkv_bias": self.attention_bias, "output_bias": self.attention_bias}
        feed_forward = {
            "type": "monet",
            "num_keys": self.moe_experts,
            "num_heads": self.moe_heads,
            "expert_size": self.moe_dim,
            "top_k": self.moe_topk,
            "decomposition": self.moe_decompose,
            "activation": self.hidden_act,
            "uniformity_loss_coef": self.uniformity_loss_coef,
            "ambiguity_loss_coef": self.ambiguity_loss_coef,
        }
        return {
            "routes": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward},
            "reuses": {"type": "pre_norm", "mixer": mixer, "feed_forward": {**feed_forward, "own_router": False}},
        }

    @property
    def block_pattern(self) -> list[str]:
        """A layer with a router, then those that use its routing."""
        if self.moe_groups < 1:
            raise ValueError(f"moe_groups={self.moe_groups}; it must be at least 1: every layer routes.")
        return ["routes"] + ["reuses"] * (self.moe_groups - 1)


MonetModel, MonetForCausalLM, MonetForSequenceClassification, MonetForTokenClassification = model_classes(
    "Monet", MonetConfig
)
