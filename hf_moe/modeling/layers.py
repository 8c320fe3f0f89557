"""Small modules and functions shared by several parts, mostly Transformers' own under the names our parts use.

Llama's are the ones every other Transformers model copies; they read `rope_parameters`, `head_dim`,
`max_position_embeddings` from any config and are replaced by hub kernels like everybody's.
"""

import copy
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRMSNorm as RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated as GroupRMSNorm

__all__ = [
    "GroupRMSNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "apply_rotary_pos_emb",
    "attend",
    "rotary_embedding",
    "rotary_width",
    "rotate",
]


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


def rotary_embedding(config: Any, width: int) -> RotaryEmbedding | None:
    """What a mixer that rotates `width` entries of each head owns: their frequencies are those of a head that wide.

    None where the model's own embedding, of width `config.head_dim`, has them already: then use the
    `position_embeddings` that every mixer receives, else call this with the `position_ids`.
    """
    if width == config.head_dim:
        return None
    own = copy.copy(config)
    own.head_dim = width
    return RotaryEmbedding(own)


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

    Returns:
        Output (B, T, H, d), and the attention weights (B, H, T, S) where the kernel makes them.
    """
    if (missing := value.shape[-1] - key.shape[-1]) > 0:  # flash kernels would cut values to the width of the keys
        query, key = (torch.nn.functional.pad(x, (0, missing)) for x in (query, key))
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
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
