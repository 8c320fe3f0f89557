"""DeepSeekMoE 16B as published: type `deepseek`, whose code for Transformers 4 no longer runs.

deepseek-ai/deepseek-moe-16b-{base,chat}; fields and saved names are those of its config.json and safetensors files.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..architectures.deepseek_moe import DeepseekMoeConfig
from ..modeling.model import model_classes


@strict
class DeepseekConfig(DeepseekMoeConfig):
    """`DeepseekMoeConfig` with the published names. Defaults are the 16B model.

    Args:
        n_routed_experts: routed experts; None for a dense model.
        n_shared_experts: experts that see every token; None for none.
        aux_loss_alpha: weight of the balance loss, over each sequence with `seq_aux`, else over the batch.
        scoring_func: `softmax`, the only one there is.
        attention_bias: biases on all four projections of the attention.
    """

    model_type = "deepseek"
    published_names: ClassVar[dict[str, str]] = {"mlp.shared_experts.": "mlp.shared_expert."}

    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True
    scoring_func: str = "softmax"
    attention_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_routed_experts is None:
            self.first_k_dense_replace = self.num_hidden_layers
        else:
            self.num_experts = self.n_routed_experts
        self.num_shared_experts = self.n_shared_experts or 0
        self.router_aux_loss_coef = self.aux_loss_alpha
        self.router_balance_loss = "sequence" if self.seq_aux else "switch"
        super().__post_init__(**kwargs)

    def validate_parts(self) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; the published code has 'softmax' only.")
        super().validate_parts()

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper's, with biases in the attention where the config wants them."""
        mixer = {"type": "attention", "qkv_bias": self.attention_bias, "output_bias": self.attention_bias}
        return {name: {**block, "mixer": mixer} for name, block in super().blocks.items()}


DeepseekModel, DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekForTokenClassification = model_classes(
    "Deepseek", DeepseekConfig
)
