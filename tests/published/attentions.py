"""Naive references of attention mixers: written from the formulas, one row, one token, one head at a time.

Nothing here imports hf_moe. `p` is the prefix of the mixer's weights, `xs` its input vectors.
"""

import math
from collections.abc import Callable

import naive
import torch
from torch import Tensor


def rotate_pairs(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotate pair (2i, 2i + 1) of one head's vector by position * theta^(-2i/d)."""
    out = []
    for i in range(0, len(x), 2):
        cos, sin = math.cos(position * theta ** (-i / len(x))), math.sin(position * theta ** (-i / len(x)))
        out += [x[i] * cos - x[i + 1] * sin, x[i + 1] * cos + x[i] * sin]
    return torch.stack(out)


def latent_attention(
    w: naive.Weights,
    p: str,
    xs: list[Tensor],
    heads: int,
    widths: tuple[int, int, int],
    turn: Callable[[Tensor, int], Tensor] = rotate_pairs,
    scales: tuple[float, float] = (1.0, 1.0),
) -> list[Tensor]:
    """DeepSeek-V2, §2.1: heads of `widths` (n, p, v), the scales of queries and latents, an optional gate per head."""
    (n, r, v), rank = widths, w[p + "kv_a_layernorm.weight"].numel()
    latents, shared, outputs = [], [], []
    for t, x in enumerate(xs):
        down = w[p + "kv_a_proj_with_mqa.weight"] @ x
        latents.append(naive.rms_norm(down[:rank], w[p + "kv_a_layernorm.weight"]) * scales[1])
        shared.append(turn(down[rank:], t))
        if p + "q_proj.weight" in w:
            q = w[p + "q_proj.weight"] @ x
        else:
            q = naive.rms_norm(w[p + "q_a_proj.weight"] @ x, w[p + "q_a_layernorm.weight"])
            q = w[p + "q_b_proj.weight"] @ q * scales[0]
        mixed = []
        for h in range(heads):
            up = w[p + "kv_b_proj.weight"][h * (n + v) : (h + 1) * (n + v)]
            mine = q[h * (n + r) : (h + 1) * (n + r)]
            scores = [mine[:n] @ (up[:n] @ latents[s]) + turn(mine[n:], t) @ shared[s] for s in range(t + 1)]
            weights = naive.softmax(torch.stack(scores) / (n + r) ** 0.5)
            head = sum(weights[s] * (up[n:] @ latents[s]) for s in range(t + 1))
            mixed.append(head * naive.sigmoid(w[p + "g_proj.weight"][h] @ x) if p + "g_proj.weight" in w else head)
        outputs.append(w[p + "o_proj.weight"] @ torch.cat(mixed))
    return outputs


def diff_qkv(
    w: naive.Weights,
    p: str,
    xs: list[Tensor],
    heads: tuple[int, int, int],
    theta: float = 10000.0,
    best: int | None = None,
    renormalize: bool = True,
) -> list[Tensor]:
    """Sigma, §3: (query, key, value) heads; with `best`, only that many keys of a query lend their values."""
    width, value_width = len(w[p + "k_proj.weight"]) // heads[1], len(w[p + "v_proj.weight"]) // heads[2]
    keys, values, outputs = [], [], []
    for t, x in enumerate(xs):
        keys.append([naive.rotate(k, t, theta) for k in (w[p + "k_proj.weight"] @ x).split(width)])
        values.append((w[p + "v_proj.weight"] @ x).split(value_width))
        q = w[p + "q_proj.weight"] @ x
        if p + "q_up_proj.weight" in w:
            q = naive.swiglu(q, *(w[f"{p}q_{name}_proj.weight"] for name in ("gate", "up", "down")))
        mixed = []
        for i, query in enumerate(q.split(width)):
            query, k, v = naive.rotate(query, t, theta), i * heads[1] // heads[0], i * heads[2] // heads[0]
            scores = torch.stack([query @ keys[s][k] / math.sqrt(width) for s in range(t + 1)])
            chosen = naive.best(scores, t + 1 if best is None else best)
            weights = naive.softmax(scores)[chosen] if not renormalize else naive.softmax(scores[chosen])
            mixed.append(sum(weight * values[s][v] for weight, s in zip(weights, chosen)))
        outputs.append(w[p + "o_proj.weight"] @ torch.cat(mixed))
    return outputs
