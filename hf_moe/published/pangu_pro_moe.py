"""Pangu Pro MoE 72B-A16B as published: type `PanguProMoE`, whose code for Transformers 4 no longer runs
(https://arxiv.org/abs/2505.21411).

ascend-tribe/pangu-pro-moe-model; fields are those of its configuration class, saved names those of its files. Models
of the second generation (`PanguProMoEV2ForCausalLM`) share the type, but not the architecture: they are refused.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.core_model_loading import SplitModulelist, WeightConverter

from ..architectures.moge import MogeConfig
from ..modeling.model import model_classes

OF_THE_SECOND = (
    "first_k_dense_replace",
    "mlp_only_layers",
    "n_routed_experts",
    "param_sink_number",
    "qk_nope_dim",
    "qk_rope_dim",
    "routed_scaling_factor",
    "router_enable_expert_bias",
    "sandwich_norm",
)


@strict
class PanguProMoEConfig(MogeConfig):
    """`MogeConfig` with the published fields: as many groups as a token has experts, a learned scale of each expert's
    weight, biases on the four projections of the attention. Defaults are the 72B model.

    Args:
        shared_expert_intermediate_size: width of all shared experts together; 0 for none.
        num_expert_groups: follows from `num_experts_per_tok`, and `num_shared_experts` from the field above.

    Raises:
        ValueError: fields of the second generation, whose layers differ.
    """

    model_type = "PanguProMoE"
    default_theta: ClassVar[float] = 16000000.0

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float | int = 0.001
    shared_expert_intermediate_size: int = 5376
    learned_router_scale: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        theirs = [name for name in OF_THE_SECOND if kwargs.get(name)]
        if theirs or any("V2" in name for name in self.architectures or ()):
            raise ValueError(
                f"This is a config of the second generation (architectures={self.architectures}, {theirs}), which is "
                "not supported: only PanguProMoEForCausalLM is, Pangu Pro MoE 72B."
            )
        self.num_expert_groups = self.num_experts_per_tok
        self.num_shared_experts = min(self.shared_expert_intermediate_size, 1)
        super().__post_init__(**kwargs)

    @classmethod
    def published_converters(cls) -> list[Any]:
        """The scales are one row (1, E) in files, and belong to the router in memory."""
        return [WeightConverter("mlp.router_scale", "mlp.gate.router_scale", [SplitModulelist(dim=0)])]

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper's, with all shared experts as one."""
        blocks = super().blocks
        blocks["moge"]["feed_forward"]["shared_intermediate_size"] = self.shared_expert_intermediate_size
        return blocks


(
    PanguProMoEModel,
    PanguProMoEForCausalLM,
    PanguProMoEForSequenceClassification,
    PanguProMoEForTokenClassification,
) = model_classes("PanguProMoE", PanguProMoEConfig)
