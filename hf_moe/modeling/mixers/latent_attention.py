"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, §2.1), decoded in the latent space.

    c = norm(W_dkv x),  k_pe = rotate(W_kr x),  [k_h, v_h] = W_ukv,h c,  [q_h, q_pe,h] = W_uq norm(W_dq x)
    score_h = (q_h k_h + q_pe,h k_pe) / sqrt(n + p),   y = W_o [sum_s softmax(score_h)_s v_h,s]

The cache holds c and k_pe. Since q_h (W_uk,h c) = (q_h W_uk,h) c, queries can attend to the latents themselves, one
key head for all of them, and W_uv,h comes afterwards ("absorbed"). Names are those of DeepSeek's checkpoints.
Letters: B batch, T time, S keys, H heads, r latent width, n, p, v entries of a head: unrotated, rotated, value.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from ..context import NO_CONTEXT, ForwardContext
from ..layers import RMSNorm, attend, rotary_embedding, rotate
from ..ops.matrix import is_plain, matrix_of
from .base import Mixer, MixerOutput


class LatentAttention(Mixer):
    """`num_attention_heads` heads whose keys and values are expanded from one latent vector per token.

    Args:
        kv_lora_rank: width r of the latent vector; the cache holds r + p numbers per token.
        qk_nope_head_dim: entries n of a query and key head that know no position.
        qk_rope_head_dim: entries p that do; all heads share their keys.
        v_head_dim: entries v of a value head.
        q_lora_rank: width of a latent vector of the queries' own; None for one plain projection.
        rotary: rotate the p entries by position; False leaves them as they are (Kimi Linear).
        rope_interleave: rotated pairs are neighbours, as in DeepSeek's checkpoints.
        scale_lora: multiply queries by sqrt(D / q_lora_rank) and c by sqrt(D / kv_lora_rank) (LongCat-Flash).
        output_gate: multiply each head's output by `sigmoid(w_h x)` (Ling 3).
    """

    tp_plan = dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "g_proj", "o_proj"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rotary: bool = True,
        rope_interleave: bool = True,
        scale_lora: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.num_key_value_groups = config, layer_idx, True, 1
        self.attention_dropout, self.sliding_window, self.rotary = config.attention_dropout, None, rotary
        self.key_widths, self.up_widths = (qk_nope_head_dim, qk_rope_head_dim), (qk_nope_head_dim, v_head_dim)
        self.latent_widths, self.rope_interleave = (kv_lora_rank, qk_rope_head_dim), rope_interleave
        self.num_heads, width, head_dim = config.num_attention_heads, config.hidden_size, sum(self.key_widths)
        self.scaling = yarn_apply_mscale(config.rope_parameters, head_dim**-0.5) if rotary else head_dim**-0.5
        self.rotary_emb = rotary_embedding(config, qk_rope_head_dim) if rotary else None
        self.latent_scale = (width / kv_lora_rank) ** 0.5 if scale_lora else 1.0
        if q_lora_rank is None:
            self.q_proj, self.q_a_proj = nn.Linear(width, self.num_heads * head_dim, bias=False), None
        else:
            self.q_a_proj = nn.Linear(width, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank)  # epsilon 1e-6, whatever the config's: so do all checkpoints
            self.q_b_proj = nn.Linear(q_lora_rank, self.num_heads * head_dim, bias=False)
            self.query_scale = (width / q_lora_rank) ** 0.5 if scale_lora else 1.0
        self.kv_a_proj_with_mqa = nn.Linear(width, sum(self.latent_widths), bias=False)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank)
        self.kv_b_proj = nn.Linear(kv_lora_rank, self.num_heads * sum(self.up_widths), bias=False)
        self.g_proj = nn.Linear(width, self.num_heads, bias=False) if output_gate else None
        self.o_proj = nn.Linear(self.num_heads * v_head_dim, width, bias=False)

    @classmethod
    def check(cls, config: Any, **options: Any) -> None:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if small := {name: options[name] for name in names if options[name] < 1}:
            raise ValueError(f"Every width of latent attention must be at least 1: {small}.")
        if options["rotary"] and options["qk_rope_head_dim"] % 2:
            raise ValueError(f"qk_rope_head_dim={options['qk_rope_head_dim']} is odd; rotary positions need pairs.")
        if options["scale_lora"] and options["q_lora_rank"] is None:
            raise ValueError("scale_lora=True scales the queries by their latent width: set q_lora_rank.")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: ForwardContext = NO_CONTEXT,
        **kwargs: Any,
    ) -> MixerOutput:
        if self.q_a_proj is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states))) * self.query_scale
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, rope = query.split(self.key_widths, -1)  # (B, H, T, n), (B, H, T, p)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split(self.latent_widths, -1)
        latent = self.kv_a_layernorm(latent) * self.latent_scale  # (B, 1, T, r), beside (B, 1, T, p)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        if self.rotary:
            rope, key_rope = rotate(rope, key_rope, *position_embeddings, interleaved=self.rope_interleave)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        way = self.attend_to_latents if self.absorbs(nope, latent, attention_mask) else self.attend_to_heads
        output, weights = way(nope, rope, latent, key_rope, attention_mask, **kwargs)
        if self.g_proj is not None:
            output = output * self.g_proj(hidden_states).float().sigmoid().to(output.dtype).unsqueeze(-1)
        return self.o_proj(output.flatten(2)), weights, None

    def attend_to_heads(self, nope, rope, latent, key_rope, attention_mask, **kwargs: Any) -> Any:
        """Expand the latents to one key and one value per head."""
        key_value = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = key_value.split(self.up_widths, -1)  # (B, H, S, n), (B, H, S, v)
        key = torch.cat([key, key_rope.expand(-1, self.num_heads, -1, -1)], -1)
        return attend(self, torch.cat([nope, rope], -1), key, value, attention_mask, **kwargs)

    def attend_to_latents(self, nope, rope, latent, key_rope, attention_mask, **kwargs: Any) -> Any:
        """One head [c, k_pe] of keys, whose first r entries are the values, for the queries of all heads."""
        heads, (matrix, offset) = nope.shape[1:3], matrix_of(self.kv_b_proj, latent.shape[-1], latent)  # (H, T)
        up_key, up_value = matrix.unflatten(0, (self.num_heads, -1)).split(self.up_widths, 1)
        query = torch.cat([nope @ up_key, rope], -1).flatten(1, 2).unsqueeze(1)  # (B, 1, H T, r + p)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(-1, heads[0], -1, -1).flatten(1, 2).unsqueeze(1)
        key = torch.cat([latent, key_rope], -1)
        output, weights = attend(self, query, key, key, attention_mask, is_causal=False, **kwargs)
        output = output.squeeze(2)[..., : latent.shape[-1]].unflatten(1, heads) @ up_value.mT  # (B, H, T, v)
        # an offset moves all scores of a query alike, but every value
        output = output.transpose(1, 2) + offset.unflatten(0, (self.num_heads, -1))[:, self.up_widths[0] :]
        return output, None if weights is None else weights.squeeze(1).unflatten(1, heads)

    def absorbs(self, nope: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether attending to latents takes fewer multiplications than expanding all S of them first.

        Per head T r (n + v) + 2 T S (r + p) < S r (n + v) + T S (n + p + v); an adapted W_ukv costs r more tokens. Not
        in training (adapters drop out at random), by flex and flash kernels, or where causality is left to the kernel.
        """
        queries, (keys, rank), up = nope.shape[2], latent.shape[2:], sum(self.up_widths)
        causal_kernel = queries > 1 and attention_mask is None
        if self.training or causal_kernel or self.config._attn_implementation not in ("eager", "sdpa"):
            return False
        expanded = keys * rank * up + queries * keys * (sum(self.key_widths) + self.up_widths[1])
        asked = queries if is_plain(self.kv_b_proj, latent.device) else queries + rank
        return asked * rank * up + queries * keys * 2 * sum(self.latent_widths) < expanded
