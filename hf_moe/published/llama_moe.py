"""LLaMA-MoE v1 as published: type `llama_moe`, whose code for Transformers 4 no longer runs
(https://arxiv.org/abs/2406.16554).

llama-moe/LLaMA-MoE-v1-{3_0B-2_16,3_5B-4_16,3_5B-2_8} and their `-sft` models: a Llama whose feed-forwards were split
into experts of equal width. Fields and saved names are those of its config.json and safetensors files.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.core_model_loading import WeightRenaming

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes

ONLY = {  # what the released models have and the code of their repositories knows
    "gate_type": "TopKBalancedNoisyGate",
    "calculator_type": "UniversalCalculator",
    "gate_use_softmax": True,
    "multiply_gate_scores": True,
    "add_weight_norm": False,
}


@strict
class LlamaMoEConfig(DecoderConfig):
    """Defaults are those of the published config class: LLaMA-MoE-3.5B-4_16 but for `score_scale_factor`.

    Args:
        intermediate_size: width of all experts of a layer together.
        num_experts: experts of a layer.
        num_selects: experts per token.
        size_experts: width of each expert in each layer; None, or `intermediate_size / num_experts` for all of them.
        gate_network: what the gate's logits come from: `mlp` (Linear, Tanh, Linear) or `linear`.
        gate_add_noise: add noise of a learned scale to the logits in training.
        gate_noise_epsilon: the smallest standard deviation of that noise.
        gate_use_balance: balance the experts by the squared coefficients of variation of importance and load.
        gate_balance_loss_weight: weight of these two in each layer. It becomes `router_aux_loss_coef`.
        score_scale_factor: multiplies the weights of the experts; one number, or one per layer.
        gate_type: `TopKBalancedNoisyGate`, the only one supported.
        gate_use_softmax: weigh experts by a softmax over the chosen logits; True is the only value supported.
        calculator_type: `UniversalCalculator`, the only one supported: no token is dropped.
        multiply_gate_scores: True is the only value supported.
        add_weight_norm: False is the only value supported.

    Raises:
        ValueError: experts of different widths, or one of the settings that are not supported.
    """

    model_type = "llama_moe"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list[list[int]] | None = None
    gate_type: str = "TopKBalancedNoisyGate"
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float | int = 0.01
    gate_add_noise: bool = True
    gate_noise_epsilon: float | int = 0.01
    calculator_type: str = "UniversalCalculator"
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list[float | int] = 1.0
    add_weight_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.router_balance_loss = "importance_load"
        self.router_aux_loss_coef = self.gate_balance_loss_weight if self.gate_use_balance else 0.0
        super().__post_init__(**kwargs)

    @classmethod
    def published_converters(cls) -> list[Any]:
        """`weight_gate.3` is `3.gate_proj.weight` to everybody else; the stacking follows from there."""
        theirs, ours = r"mlp\.calculator\.experts\.weight_{}\.\1", r"mlp\.experts\.(\d+)\.{}_proj\.weight"
        return [WeightRenaming(theirs.format(name), ours.format(name)) for name in ("gate", "up", "down")]

    def validate_parts(self) -> None:
        for name, supported in ONLY.items():
            if (value := getattr(self, name)) != supported:
                raise ValueError(f"{name}={value!r} is not supported; the released models have {supported!r}.")
        if self.intermediate_size % self.num_experts:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} is not a multiple of num_experts={self.num_experts}."
            )
        equal = [[self.intermediate_size // self.num_experts] * self.num_experts] * self.num_hidden_layers
        if self.size_experts not in (None, equal):
            raise ValueError(
                f"size_experts={self.size_experts}: only experts of equal width are supported, {equal[0][0]} for each "
                f"of {self.num_experts} experts in each of {self.num_hidden_layers} layers."
            )
        if len(self.scales) != self.num_hidden_layers:
            raise ValueError(
                f"score_scale_factor has {len(self.scales)} numbers for {self.num_hidden_layers} layers; give one for "
                "each, or one for all."
            )
        super().validate_parts()

    @property
    def scales(self) -> list[float]:
        """What the weights of each layer's experts are multiplied by."""
        scales = self.score_scale_factor
        return scales if isinstance(scales, list) else [scales] * self.num_hidden_layers

    @property
    def block_pattern(self) -> list[str]:
        """A name for each scale."""
        return [f"scaled_by_{scale}" for scale in self.scales]

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """Llama's blocks, with a mixture for the feed-forward."""
        return {f"scaled_by_{scale}": self.scaled_block(scale) for scale in self.scales}

    def scaled_block(self, scale: float) -> dict[str, Any]:
        """The block of one scale."""
        router = {
            "type": "noisy_top_k",
            "top_k": self.num_selects,
            "network": self.gate_network,
            "noise": self.gate_add_noise,
            "noise_epsilon": self.gate_noise_epsilon,
            "scale": scale,
        }
        width = self.intermediate_size // self.num_experts
        experts = {"type": "swiglu", "intermediate_size": width}
        feed_forward = {"type": "moe", "num_experts": self.num_experts, "router": router, "experts": experts}
        return {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}


LlamaMoEModel, LlamaMoEForCausalLM, LlamaMoEForSequenceClassification, LlamaMoEForTokenClassification = model_classes(
    "LlamaMoE", LlamaMoEConfig
)
