"""SPT's sparse attention (https://arxiv.org/abs/2312.10365; released code `ytgui/SPT-proto`).

    code(x) = nearest codeword of each piece of x,    match(t, j) = number of equal codes of q_t and k_j
    o_t = sum_j softmax_j(clamp(q_t . k_j / sqrt(d), -10, 10)) v_j    over the L keys that match best

One codebook per layer serves queries, keys and all heads. Where this differs from the released code:

* Exactly the L best keys, the latest first among equals. The released kernel sorts matches into four bins and fills L
  slots in scan order, so that a worse key may push out a better one.
* L = ceil(n / 8) with n the keys that this query sees, so that padding, packing and chunks change nothing. There L is
  an eighth of the sequence for every query, and early queries fill up with copies of key 0.
* Codes are of queries and keys before their rotation: the nearest codeword of a rotated vector changes with absolute
  positions, though scores do not. `rotated_codes` takes them after it, as there.
* The quantiser's loss trains the codebook only; there it also pulls queries and keys towards the codewords.

In training the loss' gradient, times `quantizer_loss_coef`, joins the backward pass at the codebook: any training loop
trains it, and the reported loss stays the model's. Loss scaling does not reach it: train in bf16 or fp32. The cache
holds each key's M codes behind the key. Scores are (B, H, T, S): the published function, not the published memory.
Letters: B batch, T queries, S keys, H query heads, d head width, M subspaces.
"""

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ..cache import MaskedLayer
from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm, apply_rotary_pos_emb
from ..ops.grouped_query import grouped_scores, grouped_sums
from ..ops.product_quantizer import GradientOnly, ProductQuantizer, best_matches, one_hot_codes
from .base import Mixer, MixerOutput


class SparseAttention(Mixer):
    """Softmax attention to the keys that a product quantiser finds most similar to the query.

    Args:
        keep: below 1 the share of the visible keys that a query attends to, rounded up; from 1 on their number.
        codeword_size: entries of a head that one code stands for.
        num_codewords: codewords per subspace, at most 256.
        clamp: limit of the scaled scores' magnitude; None for no limit.
        quantizer_loss_coef: weight of the codebook's loss in training; 0 leaves the codebook as it is.
        rotated_codes: quantise after the rotation; left-padded rows then need `position_ids` (`generate` makes them).
        qk_norm: RMSNorm over each head's query and key before the rotation (Qwen3 sources).
        qkv_bias: biases on the query, key and value projections (Qwen2 sources).
    """

    tp_plan = {
        **{f"{name}_proj": "colwise" for name in "qkv"},
        **{f"{name}_norm": "replicated_with_grad_allreduce" for name in "qk"},
        "quantizer": "replicated_with_grad_allreduce",
        "o_proj": "rowwise",
    }
    layer_type = str(MaskedLayer._layer_type)  # by reference, so that a flat file keeps the class

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        keep: float = 0.125,
        codeword_size: int = 8,
        num_codewords: int = 16,
        clamp: float | None = 10.0,
        quantizer_loss_coef: float = 0.01,
        rotated_codes: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.layer_idx, self.clamp, self.head_dim = layer_idx, clamp, config.head_dim
        self.share = Fraction(keep).limit_denominator(10**6) if keep < 1 else Fraction(1)
        self.limit = int(keep) if keep >= 1 else None
        self.num_codewords, self.quantizer_loss_coef = num_codewords, quantizer_loss_coef
        self.rotated_codes = rotated_codes
        self.scaling, self.attention_dropout = config.head_dim**-0.5, config.attention_dropout
        width, key_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.quantizer = ProductQuantizer(config.head_dim // codeword_size, num_codewords, codeword_size)

    @classmethod
    def check(
        cls, config: Any, *, keep: float, codeword_size: int, num_codewords: int, clamp: float | None, **options: Any
    ) -> None:
        if options["quantizer_loss_coef"] < 0:
            raise ValueError(f"quantizer_loss_coef={options['quantizer_loss_coef']} must not be negative.")
        if keep <= 0 or (keep > 1 and keep != int(keep)):
            raise ValueError(f"keep={keep} must be a share of the keys between 0 and 1, or a whole number of them.")
        if codeword_size < 1 or config.head_dim % codeword_size or config.head_dim // codeword_size > 256:
            raise ValueError(
                f"codeword_size={codeword_size} must divide head_dim={config.head_dim} into 256 pieces or fewer."
            )
        if not 2 <= num_codewords <= 256:
            raise ValueError(f"num_codewords={num_codewords} must be between 2 and 256.")
        if clamp is not None and clamp <= 0:
            raise ValueError(f"clamp={clamp} must be positive; use None for no limit.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        assert attention_mask is not None, "masks of this layer type are always explicit"
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)  # (B, H, T, d)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        plain = query, key
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        quantized = (query, key) if self.rotated_codes else plain
        codes, key_codes = (self.quantizer.encode(x) for x in quantized)
        coded_key = torch.cat([key, key_codes.to(key.dtype)], -1)
        if past_key_values is not None:
            coded_key, value = past_key_values.update(coded_key, value, self.layer_idx)
        all_keys, key_codes = coded_key.split([self.head_dim, codes.shape[-1]], -1)
        one_hots = (one_hot_codes(x, self.num_codewords, query.dtype) for x in (codes, key_codes))
        kept = best_matches(grouped_scores(*one_hots), attention_mask, self.share, self.limit)
        scores = grouped_scores(query, all_keys) * self.scaling
        if self.clamp is not None:
            scores = scores.clamp(-self.clamp, self.clamp)
        weights = scores.masked_fill(~kept, torch.finfo(scores.dtype).min).softmax(-1) * kept  # nothing for padding
        weights = F.dropout(weights.to(value.dtype), self.attention_dropout, self.training)
        output = self.o_proj(grouped_sums(weights, value).transpose(1, 2).flatten(2))
        if self.training and self.quantizer_loss_coef and self.quantizer.weight.requires_grad:
            loss = self.quantizer_loss(*(x.detach() for x in quantized), token_mask=context.token_mask)
            output = GradientOnly.apply(output, self.quantizer_loss_coef * loss)
        return output, weights, None

    def quantizer_loss(
        self, query: torch.Tensor, key: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the codebook learns from: the quantiser's loss on queries (B, H, T, d) plus that on keys.

        `token_mask` (B T,) says which tokens count. Differentiable in all of them, as in the released code.
        """
        mask = None if token_mask is None else token_mask.to(query.device).view(query.shape[0], 1, -1)
        return self.quantizer.loss(query, mask) + self.quantizer.loss(key, mask)
