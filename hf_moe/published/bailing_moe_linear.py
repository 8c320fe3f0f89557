"""Ring-linear 2.0 as published: type `bailing_moe_linear`, whose code for Transformers 4 no longer runs
(https://arxiv.org/abs/2510.19338).

inclusionAI/Ring-{mini,flash}-linear-2.0 (`BailingMoeLinearV2ForCausalLM`): Ling 2.0 with lightning attention in all
but the last layer of each group. Fields and saved names are those of their config.json and safetensors files.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.model import model_classes
from ..modeling.multi_token_prediction import MultiTokenForCausalLM
from .bailing_moe import BailingMoeConfig

LATENT = ("kv_lora_rank", "q_lora_rank")  # later models of this type have latent attention


@strict
class BailingMoeLinearV2Config(BailingMoeConfig):
    """`BailingMoeConfig` with a second kind of attention. Defaults are Ring-mini-linear-2.0.

    The decays follow the code of the repositories: their factor counts layers from -1 (`slopes="ring"` in
    `mixers/lightning_attention.py`), where SGLang counts from 0 and mlx-lm lets the first two layers share one.

    Args:
        layer_group_size: softmax attention in the last of so many layers, and in those behind the last whole group.
        group_norm_size: into how many groups the output norm of lightning attention divides the heads' channels.
        linear_silu: SiLU on queries, keys and values of lightning attention.
        use_linear_silu: another spelling of it, which wins.
        linear_rope: rotate queries and keys of lightning attention too; True is the only value supported.
        score_function: of the router: `sigmoid`, the only one supported.
        moe_shared_expert_intermediate_size: width of one shared expert; None: that of a routed one.

    Raises:
        ValueError: biases, other scores, or the latent attention of later models.
    """

    model_type = "bailing_moe_linear"
    published_names: ClassVar[dict[str, str]] = {
        **BailingMoeConfig.published_names,
        "self_attn.g_norm.": "self_attn.norm.",
    }
    default_theta: ClassVar[float] = 1000000.0

    max_position_embeddings: int = 131072
    first_version: bool | None = False
    layer_group_size: int = 5
    group_norm_size: int = 4
    linear_silu: bool = False
    use_linear_silu: bool | None = None
    linear_rope: bool = True
    score_function: str = "sigmoid"
    moe_shared_expert_intermediate_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if theirs := [name for name in LATENT if kwargs.get(name)]:
            raise ValueError(f"{theirs} belong to latent attention; only the softmax attention of 2.0 is supported.")
        super().__post_init__(**kwargs)

    def validate_parts(self) -> None:
        if self.layer_group_size < 1:
            raise ValueError(f"layer_group_size={self.layer_group_size} must be 1 (softmax attention only) or more.")
        only = {"use_bias": False, "use_qkv_bias": False, "linear_rope": True, "score_function": "sigmoid"}
        for name, supported in only.items():
            if (value := getattr(self, name)) != supported:
                raise ValueError(f"{name}={value!r} is not supported; the released models have {supported!r}.")
        super().validate_parts()

    @property
    def block_pattern(self) -> list[str]:
        """Ling's kinds of layers, in turns with lightning and softmax attention."""
        kinds, size = super().block_pattern, self.layer_group_size
        whole = len(kinds) // size * size
        softmax = [(layer + 1) % size == 0 or layer >= whole for layer in range(len(kinds))]
        return [kind if is_softmax else f"linear_{kind}" for kind, is_softmax in zip(kinds, softmax)]

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """Ling 2.0's, each with softmax and with lightning attention."""
        blocks = super().blocks
        if self.moe_shared_expert_intermediate_size is not None and self.num_shared_experts:
            blocks["sparse"]["feed_forward"]["shared_intermediate_size"] = self.moe_shared_expert_intermediate_size
        lightning = {
            "type": "lightning_attention",
            "slopes": "ring",
            "silu": self.linear_silu if self.use_linear_silu is None else self.use_linear_silu,
            "scaled": True,
            "qk_norm": self.use_qk_norm,
            "partial_rotary_factor": self.rotary_fraction,
            "group_norm_size": self.group_norm_size,
        }
        return blocks | {f"linear_{name}": {**block, "mixer": lightning} for name, block in blocks.items()}


(
    BailingMoeLinearV2Model,
    BailingMoeLinearV2ForCausalLM,
    BailingMoeLinearV2ForSequenceClassification,
    BailingMoeLinearV2ForTokenClassification,
) = model_classes("BailingMoeLinearV2", BailingMoeLinearV2Config, MultiTokenForCausalLM)
