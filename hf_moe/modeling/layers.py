"""Small modules and functions shared by several parts: Transformers' own, under the names our parts use.

Llama's are the ones every other Transformers model copies; they read `rope_parameters`, `head_dim`,
`max_position_embeddings` from any config and are replaced by hub kernels like everybody's.
"""

from transformers.models.llama.modeling_llama import LlamaRMSNorm as RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

__all__ = ["RMSNorm", "RotaryEmbedding", "apply_rotary_pos_emb", "eager_attention_forward"]
