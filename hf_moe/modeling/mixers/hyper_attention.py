"""HyperAttention (https://arxiv.org/abs/2310.05869; released code `insuhan/hyper-attn`): near-linear long prompts.

Sequences whose half, rounded up, is below `min_seq_len` get exact softmax attention. Longer ones are cut in halves
again and again; attention within the last pieces is exact, attention of a second half to its first is estimated from
`block_size` keys that a hash finds similar to the query and `sample_size` random ones (`ops/hyper_attention.py`).

What holds, and what does not, when a forward pass estimates:

* The same tokens give the same logits: draws depend on `seed`, the layer, the level and the head, on nothing else.
* No token reads a later one, but which keys it is paired with depends on how the later tokens of its half sort. So the
  logits of a prefix are not those of the prefix alone, beyond the first `min_seq_len / 2` tokens.
* The cache is that of softmax attention, and tokens that continue one attend to all of it exactly, at full cost:
  decoding saves nothing, and prefill in pieces differs from prefill at once (it is exact if the pieces are short).
* Rows must be whole: padding or packing raises. Shorter passes take any mask.

Parameters are those of `attention`, whose weights load as they are.
Letters: B batch, T time, H query heads, d head width.
"""

from typing import Any

import torch
from torch.compiler import is_compiling
from transformers.cache_utils import Cache

from ..context import NO_CONTEXT, ForwardContext
from ..layers import attend
from ..ops.hyper_attention import HyperOptions, hyper_attention, is_estimated
from ..ops.whole_rows import check_whole_rows
from .attention import Attention
from .base import MixerOutput

WHOLE_ROWS = (
    "HyperAttention cannot estimate rows with padding, several packed sequences or another mask that is not plainly "
    "causal: run sequences of one length without padding, or be exact: raise min_seq_len above half the length, "
    "rounded up."
)


class HyperAttention(Attention):
    """Causal attention that is estimated where it reaches far back.

    Args:
        block_size: b, keys per block of the sorted square.
        sample_size: m, random keys per query and square.
        min_seq_len: sequences up to this length, and squares of smaller sides, are exact.
        num_projections: r, hyperplanes of the hash.
        seed: of the hyperplanes and samples.
        qk_norm: RMSNorm over each head's query and key before the rotation (Qwen3 sources).
        qkv_bias: biases on the query, key and value projections (Qwen2 and ChatGLM sources).
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        block_size: int = 256,
        sample_size: int = 256,
        min_seq_len: int = 4096,
        num_projections: int = 7,
        seed: int = 0,
        qk_norm: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(config, layer_idx, qk_norm=qk_norm, qkv_bias=qkv_bias)
        self.options = HyperOptions(block_size, sample_size, num_projections, min_seq_len, seed, layer_idx)

    @classmethod
    def check(cls, config: Any, *, num_projections: int, seed: int, **options: Any) -> None:
        for name in ("block_size", "sample_size", "min_seq_len"):
            if options[name] < 1:
                raise ValueError(f"{name}={options[name]} must be at least 1.")
        if not 1 <= num_projections <= 24:
            raise ValueError(f"num_projections={num_projections} must be between 1 and 24; they make 2^r buckets.")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative.")
        if config.attention_dropout:
            raise ValueError("hyper_attention has no dropout inside its estimate: set attention_dropout=0.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        query, key, value = self.project(hidden_states, position_embeddings, **kwargs)
        estimates = is_estimated(query.shape[2], self.options) and cache_is_empty(past_key_values, self.layer_idx)
        all_keys, all_values = key, value
        if past_key_values is not None:
            all_keys, all_values = past_key_values.update(key, value, self.layer_idx)
        if not estimates:
            output, weights = attend(self, query, all_keys, all_values, attention_mask, **kwargs)
            return self.o_proj(output.flatten(2).contiguous()), weights, None
        check_whole_rows(query.shape[2], attention_mask, context.token_mask, context.segments, WHOLE_ROWS)
        key, value = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (key, value))
        output = hyper_attention(query, key, value, self.scaling, self.options).to(value.dtype)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None, None


def cache_is_empty(cache: Cache | None, layer_idx: int) -> bool:
    """Whether the cache is empty, so that these tokens are the whole sequence."""
    seen: Any = 0 if cache is None else cache.get_seq_length(layer_idx)
    if isinstance(seen, torch.Tensor) and is_compiling():  # a static cache in use: a graph cannot look into it
        return False
    return int(seen) == 0
