"""Lightning attention: linear attention with a constant decay per head (MiniMax-01, https://arxiv.org/abs/2501.08313,
section 2.2; Ring-linear, https://arxiv.org/abs/2510.19338).

    S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   y = W_o (sigmoid(W_g x) o RMSNorm(o))

Letters: B batch, T time, H heads, d head width, l layer counted from 0, L layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import GroupRMSNorm, RMSNorm, rotary_embedding, rotary_width, rotate
from ..ops.linear_attention import linear_attention
from ..packing import Rows
from .base import MixerOutput
from .recurrent_mixer import RecurrentMixer

SLOPES = ("minimax", "ring", "fla")


def decay_slopes(convention: str, num_heads: int, layer: int, num_layers: int, device: torch.device) -> torch.Tensor:
    """The decays s_h (H,) of one layer. Three conventions are in use and differ: a checkpoint needs its own.

    With ALiBi's a_h = 2^(-8 (h + 1) / H), for H no power of two those of the next lower power P, then every other one
    of 2 P (the authors; Transformers' MiniMax uses the plain formula there, and L - 1 + 1e-5 for L - 1):

        minimax:  a_h (1 - l / (L - 1) + 1e-5)          MiniMax, TransNormer 2, Ring's SGLang kernels
        ring:     a_h (1 - (l - 1) / (L - 1) + 1e-5)    Ring- and Ling-linear's code on the hub
        fla:      8 h / H (1 - l / L)                   flash-linear-attention's `chunk_lightning_attn`
    """
    head = torch.arange(num_heads, device=device, dtype=torch.float32)
    if convention == "fla":
        return head * (8 / num_heads * (1 - layer / num_layers))
    power = 1 << (num_heads.bit_length() - 1)
    exponent = torch.where(head < power, (head + 1) * (8 / power), (2 * (head - power) + 1) * (4 / power))
    depth = layer - 1 if convention == "ring" else layer
    return torch.exp2(-exponent) * (1 - depth / max(num_layers - 1, 1) + 1e-5)


class LightningAttention(RecurrentMixer):
    """Linear attention that forgets at a fixed rate per head and normalizes its output; the state is H d^2 in float32.

    Defaults are MiniMax's (with `rms_norm_eps=1e-6`). Ring-linear: `slopes="ring", silu=False, scaled=True,
    qk_norm=True, partial_rotary_factor=0.5, group_norm_size=4`.

    Args:
        slopes: convention of the decays, `minimax`, `ring` or `fla`; see `decay_slopes`.
        silu: SiLU on queries, keys and values.
        scaled: divide queries by sqrt(d).
        qk_norm: RMSNorm over each head's query and key.
        partial_rotary_factor: share of each head, from its start, that is rotated by position; 0 for none.
        group_norm_size: into how many groups the output norm divides the concatenated heads; 1 is all together.
        gated: multiply the normed output by a sigmoid gate.
    """

    tp_plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "g_proj"), "replicate")

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        slopes: str = "minimax",
        silu: bool = True,
        scaled: bool = False,
        qk_norm: bool = False,
        partial_rotary_factor: float = 0.0,
        group_norm_size: int = 1,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.layer_idx, self.num_layers, self.slopes = layer_idx, config.num_hidden_layers, slopes
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.silu, self.scaled = silu, scaled
        width, size = self.num_heads * self.head_dim, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, size, bias=False)
        self.g_proj = nn.Linear(size, width, bias=False) if gated else None
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.norm = GroupRMSNorm(width, width // group_norm_size, config.rms_norm_eps)
        rotated = rotary_width(self.head_dim, partial_rotary_factor) if partial_rotary_factor else self.head_dim
        self.rotary, self.rotary_emb = bool(partial_rotary_factor), rotary_embedding(config, rotated)

    @classmethod
    def check(
        cls, config: Any, *, slopes: str, partial_rotary_factor: float, group_norm_size: int, **options: Any
    ) -> None:
        width = config.num_attention_heads * config.head_dim
        if slopes not in SLOPES:
            raise ValueError(f"slopes={slopes!r} is unknown; choose from {list(SLOPES)}.")
        if group_norm_size < 1 or width % group_norm_size:
            raise ValueError(
                f"group_norm_size={group_norm_size} does not divide the {width} channels of all heads into groups."
            )
        if partial_rotary_factor:
            rotary_width(config.head_dim, partial_rotary_factor)

    def initial_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = (hidden_states.shape[0], self.num_heads, self.head_dim, self.head_dim)
        return (hidden_states.new_zeros(size, dtype=torch.float32),)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> MixerOutput:
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, kwargs["position_ids"])
        return super().forward(hidden_states, position_embeddings, *args, **kwargs)

    def scan(
        self, hidden_states: torch.Tensor, states: tuple[torch.Tensor, ...], rows: Rows
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.silu:
            query, key, value = F.silu(query), F.silu(key), F.silu(value)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary:
            assert rows.position_embeddings is not None
            query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *rows.position_embeddings)
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        decay = -decay_slopes(self.slopes, self.num_heads, self.layer_idx, self.num_layers, hidden_states.device)
        if self.scaled:
            query = query * self.head_dim**-0.5
        output, state = linear_attention(query, key, value, states[0], rows, decay, owner=type(self).__name__)
        output = self.norm(output.flatten(2)).to(hidden_states.dtype)
        if self.g_proj is not None:
            output = self.g_proj(hidden_states).sigmoid() * output
        return self.o_proj(output), (state,)
