"""Naive float64 building blocks of the reference models: written from the formulas, one token, one head at a time.

Nothing here imports hf_moe. Letters: T time, D width, H heads, d head width.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def double(model: torch.nn.Module) -> Weights:
    """The weights of a model as independent float64 leaves."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max())
    return e / e.sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rotate(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotate pair (i, i + d/2) of one head's vector by position * theta^(-2i/d)."""
    half = len(x) // 2
    out = []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out.append(x[i + half] * math.cos(angle) + x[i] * math.sin(angle))
    return torch.stack(out)


def attention(xs: list[Tensor], wq: Tensor, wk: Tensor, wv: Tensor, heads: int, key_heads: int) -> list[Tensor]:
    """Causal grouped-query attention of one set of heads, before the output projection: T vectors of size H d."""
    d = wq.shape[0] // heads
    keys = [[rotate((wk @ x)[m * d : (m + 1) * d], t) for m in range(key_heads)] for t, x in enumerate(xs)]
    values = [[(wv @ x)[m * d : (m + 1) * d] for m in range(key_heads)] for x in xs]
    outputs = []
    for t, x in enumerate(xs):
        mixed = []
        for h in range(heads):
            m = h // (heads // key_heads)
            query = rotate((wq @ x)[h * d : (h + 1) * d], t)
            scores = softmax(torch.stack([query @ keys[s][m] / math.sqrt(d) for s in range(t + 1)]))
            mixed.append(sum(scores[s] * values[s][m] for s in range(t + 1)))
        outputs.append(torch.cat(mixed))
    return outputs


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def best(scores: Tensor, k: int) -> list[int]:
    """Indices of the k largest scores."""
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def switch(scores: list[Tensor], chosen: list[list[int]]) -> Tensor:
    """E sum_e (share of assignments to e) (mean score of e)."""
    experts, assignments = len(scores[0]), sum(len(c) for c in chosen)
    total = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        share = sum(c.count(e) for c in chosen) / assignments
        total = total + share * sum(s[e] for s in scores) / len(scores)
    return experts * total


def z_loss(logits: list[Tensor]) -> Tensor:
    """Mean over tokens of the squared log-partition function."""
    return sum(torch.log(torch.exp(x).sum()) ** 2 for x in logits) / len(logits)
