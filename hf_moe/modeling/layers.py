"""Small modules and functions shared by several parts, mostly Transformers' own under the names our parts use.

Llama's are the ones every other Transformers model copies; they read `rope_parameters`, `head_dim`,
`max_position_embeddings` from any config and are replaced by hub kernels like everybody's.
"""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm as RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

__all__ = ["RMSNorm", "RotaryEmbedding", "apply_rotary_pos_emb", "attend"]


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
        query: (B, H, T, d); key and value: (B, H / groups, S, d).

    Returns:
        Output (B, T, H, d), and the attention weights (B, H, T, S) where the kernel makes them.
    """
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
