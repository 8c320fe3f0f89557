"""Small modules and functions shared by several parts, mostly Transformers' own under the names our parts use.

Llama's are the ones every other Transformers model copies; they read `rope_parameters`, `head_dim`,
`max_position_embeddings` from any config and are replaced by hub kernels like everybody's.
"""

import copy
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRMSNorm as RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated as GroupRMSNorm

from .ops.soft_cap import soft_capped_attention

__all__ = [
    "GroupRMSNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "apply_rotary_pos_emb",
    "attend",
    "check_rope_parameters",
    "rotary_embedding",
    "rotary_width",
    "rotate",
]


UNCAPPED = ("eager", "sdpa")  # Transformers' kernels without a soft cap; their masks fit ours


def rotary_width(head_dim: int, partial_rotary_factor: float) -> int:
    """How many entries of a head are rotated by position.

    Raises:
        ValueError: none, more than there are, or an odd number.
    """
    width = int(head_dim * partial_rotary_factor)
    if not 0 < width <= head_dim or width % 2:
        raise ValueError(
            f"partial_rotary_factor={partial_rotary_factor} would rotate {width} of {head_dim} entries of each head; "
            "it must be an even number of them. Use rotary=False for none."
        )
    return width


def rotary_embedding(config: Any, width: int, rope_parameters: dict[str, Any] | None = None) -> RotaryEmbedding | None:
    """What a mixer owns that rotates `width` entries of each head: their frequencies are those of a head that wide.

    None where the model's own embedding, of width `config.head_dim`, has them already: then use the
    `position_embeddings` that every mixer receives, else call this with the `position_ids`. `rope_parameters` are a
    layer's own, in Transformers' words; None means those of the model.
    """
    if width == config.head_dim and rope_parameters is None:
        return None
    own = copy.copy(config)
    own.head_dim = width
    if rope_parameters is not None:
        own.rope_parameters = dict(rope_parameters)
    return RotaryEmbedding(own)


def check_rope_parameters(rope_parameters: dict[str, Any]) -> None:
    """Refuse a mixer's own rotary parameters that do not say all of the frequencies, or cut heads as well."""
    if not {"rope_type", "rope_theta"} <= rope_parameters.keys():
        raise ValueError(f"rope_parameters={rope_parameters} of a mixer need 'rope_type' and 'rope_theta'.")
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if rope_parameters["rope_type"] not in known:
        raise ValueError(f"rope_type={rope_parameters['rope_type']!r} is unknown; choose from {sorted(known)}.")
    if rope_parameters.get("partial_rotary_factor", 1.0) != 1:
        raise ValueError("partial_rotary_factor is an option of the mixer, beside rope_parameters, not inside.")


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first `cos.shape[-1]` entries of each head by position; the others pass through.

    Args:
        query: (B, H, T, d); key: (B, Hk, T, d); cos and sin: (B, T, r), r <= d.
        interleaved: pairs are neighbours (x0, x1), (x2, x3) ... (DeepSeek) instead of (x0, x[r/2]) ... The rotated
            entries come out in the second order, in query and key alike.
    """
    apply, width = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb, cos.shape[-1]
    rotated, rotated_key = apply(query[..., :width], key[..., :width], cos, sin)
    if width == query.shape[-1]:
        return rotated, rotated_key
    return torch.cat([rotated, query[..., width:]], -1), torch.cat([rotated_key, key[..., width:]], -1)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention by the kernel that `attn_implementation` names.

    Args:
        module: the mixer; has `config`, `scaling`, `attention_dropout`, `sliding_window`, and what the kernels read:
            `num_key_value_groups`, `is_causal`, `layer_idx`.
        query: (B, H, T, d); key: (B, H / groups, S, d); value: the same or of another width.
        kwargs: for the kernel; `softcap` c turns scores s into `c tanh(s / c)`.

    Returns:
        Output (B, T, H, d), and the attention weights (B, H, T, S) where the kernel makes them.

    Raises:
        ValueError: the kernel is not known to cap scores, and may leave the cap out without a word.
    """
    if (missing := value.shape[-1] - key.shape[-1]) > 0:  # flash kernels would cut values to the width of the keys
        query, key = (torch.nn.functional.pad(x, (0, missing)) for x in (query, key))
    name = module.config._attn_implementation or "eager"
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if kwargs.get("softcap") is not None:
        if name in UNCAPPED:
            kernel = soft_capped_attention
        elif "flash" not in name and "flex" not in name:  # those cap scores, or say that they cannot
            raise ValueError(
                f"attn_implementation={name!r} is not known to cap scores (softcap={kwargs['softcap']}): choose"
                f" flex_attention, a flash attention or one of {UNCAPPED}, which run in plain torch then."
            )
    return kernel(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=module.sliding_window,
        **kwargs,
    )
