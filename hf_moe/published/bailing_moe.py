"""Ling and Ring as published: type `bailing_moe`, whose code for Transformers 4 no longer runs.

inclusionAI/{Ling,Ring}-{mini,flash}-2.0 and Ling-1T (`BailingMoeV2ForCausalLM`), Ling-lite and Ling-plus 1.x
(`BailingMoeForCausalLM`). Fields and saved names are those of their config.json and safetensors files; queries, keys
and values are one matrix there and three in memory.
"""

import re
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from ..architectures.ling import LingConfig
from ..modeling.model import model_classes
from ..modeling.multi_token_prediction import MultiTokenForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@strict
class BailingMoeConfig(LingConfig):
    """`LingConfig` with the published names; which of the two generations it is, `architectures` says.

    Version 1 has softmax scores, no groups, no selection bias, no norms of queries and keys, and rotates whole heads.

    Args:
        first_version: Ling 1.x; None: what `architectures` says, 2.0 without any.
        rotary_dim: rotated entries of a head; the other spelling of `partial_rotary_factor`.
        norm_head: normalise the rows of the output head; refused, for no rule for it was at hand.
        num_nextn_predict_layers: prediction layers, for which released checkpoints hold no weights: more than 0 start
            anew.
    """

    model_type = "bailing_moe"
    published_names: ClassVar[dict[str, str]] = {
        "attention.": "self_attn.",  # first: saving goes the other way round
        "self_attn.query_layernorm.": "self_attn.q_norm.",
        "self_attn.key_layernorm.": "self_attn.k_norm.",
        "self_attn.dense.": "self_attn.o_proj.",
        "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared_experts.": "mlp.shared_expert.",
    }

    first_version: bool | None = None
    num_nextn_predict_layers: int = 0
    rotary_dim: int | None = None
    norm_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.first_version is None:  # saving puts the name of our class into `architectures`
            self.first_version = any("V2" not in name for name in self.architectures or ())
        if self.first_version:
            self.n_group = self.topk_group = 1
            self.routed_scaling_factor, self.rotary_fraction = 1.0, 1.0
            self.moe_router_enable_expert_bias = self.use_qk_norm = False
        if self.num_shared_experts is None:
            self.num_shared_experts = 0
        super().__post_init__(**kwargs)
        if self.rotary_dim is not None and "partial_rotary_factor" not in kwargs:
            assert self.head_dim is not None
            self.rotary_fraction = self.rotary_dim / self.head_dim

    @classmethod
    def published_converters(cls) -> list[Any]:
        """What renaming inside layers does not reach."""
        ends = ("weight", "bias")
        split = [
            WeightConverter(f"query_key_value.{end}", [f"{name}.{end}" for name in PROJECTIONS], [Split(dim=0)])
            for end in ends
        ]
        return [WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."), *split]

    def validate_parts(self) -> None:
        if self.norm_head:
            raise ValueError("norm_head=True is not supported: load a checkpoint without it.")
        super().validate_parts()

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """Ling 2.0's, with version 1's router where the config says so."""
        blocks = super().blocks
        if self.first_version:
            router = {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": self.norm_topk_prob}
            blocks["sparse"]["feed_forward"]["router"] = router
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """With the published spelling of what others read: the rotated part, and which generation this is."""
        settings = {**super().to_dict(), "partial_rotary_factor": self.rotary_fraction}
        if not self.first_version and settings.get("architectures"):
            names = (re.sub(r"^BailingMoe(?=For|Model)", "BailingMoeV2", name) for name in settings["architectures"])
            settings["architectures"] = list(names)
        return settings


(
    BailingMoeModel,
    BailingMoeForCausalLM,
    BailingMoeForSequenceClassification,
    BailingMoeForTokenClassification,
) = model_classes("BailingMoe", BailingMoeConfig, MultiTokenForCausalLM)
