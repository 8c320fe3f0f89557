"""Gemma 2 and 3 in Llama's terms: what they multiply by at run time is multiplied into the weights.

https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786. What differs from Llama, after Transformers' code:

* Norms multiply by 1 + w. We store 1 + w.
* Embeddings are multiplied by sqrt(hidden_size), rounded to their own type; the head is not. We store the products,
  which unties the head: a copy of the embeddings, of `vocab_size * hidden_size` more parameters.
* Scores are q k / sqrt(query_pre_attn_scalar). Ours are q k / sqrt(head_dim), so that sqrt(head_dim /
  query_pre_attn_scalar) goes into the queries' projection (Gemma 2) or norm (Gemma 3).
* Gemma 3's sliding layers have rotary parameters of their own, its other ones those of the model.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .recipes import Kitchen, Recipe, Scale, Tensor

GEMMA3_HINT = (
    "it has a vision tower; upcycle its text part, Gemma3ForCausalLM.from_pretrained(SOURCE,"
    " config=AutoConfig.from_pretrained(SOURCE).text_config, key_mapping={'^language_model.': ''})"
)


def gemma2(config: Any) -> dict[str, Any]:
    """The facts of Gemma 2."""
    facts = _common(config)
    if config.attn_logit_softcapping is not None:
        facts["special"]["attn_logit_softcapping"] = config.attn_logit_softcapping
    return facts


def gemma3_text(config: Any) -> dict[str, Any]:
    """The facts of Gemma 3's language model."""
    if config.attn_logit_softcapping is not None:
        raise ValueError(
            f"attn_logit_softcapping={config.attn_logit_softcapping}, which Transformers' Gemma 3 does not apply:"
            " set it to None if the model was trained without"
        )
    facts = _common(config)
    ropes = config.rope_parameters
    facts["fields"]["rope_parameters"] = dict(ropes["full_attention"])
    if any(facts["sliding_layers"]):
        facts["special"]["local_rope_parameters"] = dict(ropes["sliding_attention"])
    return {**facts, "qk_norm": "head"}


def _common(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention=True: its tokens look ahead, those of all targets do not")
    special = {}
    if config.final_logit_softcapping is not None:
        special["final_logit_softcapping"] = config.final_logit_softcapping
    return {
        "block_type": "sandwich",
        "fields": {"hidden_act": config.hidden_activation, "tie_word_embeddings": False},
        "attention_bias": "qkvo" if config.attention_bias else "none",
        "sliding_layers": tuple(kind == "sliding_attention" for kind in config.layer_types),
        "special": special,
    }


def locate_gemma(config: Any, source: int, name: str) -> Recipe:
    """Where a tensor of Llama's is, and what has to be multiplied into it."""
    if name == "model.embed_tokens.weight":
        return ScaleInOwnType(Tensor(source, name), config.hidden_size**0.5)
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return Tensor(source, "model.embed_tokens.weight")
    query_scale = (config.head_dim / config.query_pre_attn_scalar) ** 0.5
    if "norm." in name:
        scale = query_scale if name.endswith("q_norm.weight") else 1.0
        return Affine(Tensor(source, name), scale, scale)
    if ".q_proj." in name and config.model_type == "gemma2" and query_scale != 1:
        return Scale(Tensor(source, name), query_scale)
    return Tensor(source, name)


@dataclass(frozen=True)
class Affine(Recipe):
    """Every entry times a factor, plus an offset, in float64 and rounded once; for tensors as small as norms."""

    of: Recipe
    factor: float
    offset: float

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        tensor = self.of.run(kitchen)
        return tensor.double().mul(self.factor).add(self.offset).to(tensor.dtype)

    def rounds(self) -> bool:
        return True


@dataclass(frozen=True)
class ScaleInOwnType(Recipe):
    """Every entry times a factor that is itself rounded to the tensor's type, as models multiply at run time: the
    product is bit by bit theirs."""

    of: Recipe
    factor: float

    def run(self, kitchen: Kitchen) -> torch.Tensor:
        tensor = self.of.run(kitchen)
        return tensor * torch.tensor(self.factor, dtype=tensor.dtype, device=tensor.device)
