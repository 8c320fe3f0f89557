"""What the references of Gated DeltaNet and Kimi Delta Attention share: written from the formulas, token by token."""

import math
from typing import Any

import recurrences
import torch
from naive import Weights, rms_norm, silu
from torch import Tensor

from hf_moe.modeling.packing import Rows


def exact(mixer: Any) -> Any:
    """The mixer with a norm that computes in float64: Transformers' computes in fp32 whatever it is given."""
    if mixer.gated:
        return mixer
    norm = torch.nn.RMSNorm(mixer.value_head_dim, eps=1e-6)
    norm.weight = mixer.o_norm.weight
    mixer.o_norm = norm
    return mixer


def convolved(w: Weights, name: str, xs: list[Tensor]) -> list[Tensor]:
    """SiLU of the short convolution of one projection: T vectors."""
    kernel = w[f"{name}_conv1d.weight"][:, 0]
    projected = [w[f"{name}_proj.weight"] @ x for x in xs]
    width = kernel.shape[1]
    return [
        silu(sum(kernel[:, width - 1 - age] * projected[t - age] for age in range(min(width, t + 1))))
        for t in range(len(xs))
    ]


def inputs(mixer: Any, w: Weights, xs: list[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """Queries, keys and values of each value head."""
    queries, keys, values = (convolved(w, name, xs) for name in "qkv")
    heads, k, v = [], mixer.key_head_dim, mixer.value_head_dim
    for h in range(mixer.num_value_heads):
        own = h // (mixer.num_value_heads // mixer.num_heads)
        mine = [[x[own * k : (own + 1) * k] for x in xs] for xs in (queries, keys)]
        unit = [[x / torch.sqrt((x * x).sum() + 1e-6) for x in xs] for xs in mine]
        heads.append(([q / math.sqrt(k) for q in unit[0]], unit[1], [x[h * v : (h + 1) * v] for x in values]))
    return heads


def recurrence(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], decays: list[Tensor], strengths: list[Tensor]
) -> list[Tensor]:
    """S = (I - beta k k^T) diag(alpha) S + beta k v^T and o = S^T q of one head."""
    state = torch.zeros(len(keys[0]), len(values[0]), dtype=keys[0].dtype)
    identity, outputs = torch.eye(len(keys[0]), dtype=state.dtype), []
    for q, k, v, alpha, beta in zip(queries, keys, values, decays, strengths):
        forget = torch.diag(alpha.expand(len(k)))
        state = (identity - beta * torch.outer(k, k)) @ forget @ state + beta * torch.outer(k, v)
        outputs.append(state.T @ q)
    return outputs


def outputs(mixer: Any, w: Weights, heads: list[list[Tensor]], gates: list[Tensor] | None) -> list[Tensor]:
    """Norm of each head, gate and output projection."""
    results = []
    for t in range(len(heads[0])):
        normed = torch.cat([rms_norm(head[t], w["o_norm.weight"]) for head in heads])
        results.append(w["o_proj.weight"] @ (normed if gates is None else normed * gates[t]))
    return results


def check_packed_gradients(mixer: Any) -> None:
    """Two rows of packed sequences give the gradients of the sequences by themselves."""
    x = recurrences.hidden(mixer, time=70, rows=2).requires_grad_()
    segments = torch.zeros(2, 70, dtype=torch.long)
    segments[0, 5:], segments[0, 66:], segments[1, 64:] = 1, 2, 1
    direction = torch.randn(x.shape, dtype=x.dtype)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [x, *mixer.parameters()]))

    packed = gradients((recurrences.run(mixer, x, Rows(None, segments))[0] * direction).sum())
    alone = torch.zeros((), dtype=x.dtype)
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        mine = segments[row] == number
        output = recurrences.run(mixer, x[row : row + 1, mine])[0]
        alone = alone + (output * direction[row, mine]).sum()
    torch.testing.assert_close(packed, gradients(alone), atol=1e-9, rtol=1e-9)


def check_state_size(mixer: Any) -> None:
    """H K V numbers in fp32, and W - 1 inputs of each convolution."""
    x = torch.zeros(3, 1, mixer.q_proj.in_features, dtype=torch.bfloat16)
    *convolutions, state = mixer.initial_states(x)
    assert state.shape == (3, mixer.num_value_heads, mixer.key_head_dim, mixer.value_head_dim)
    assert state.dtype == torch.float32
    channels = 2 * mixer.num_heads * mixer.key_head_dim + mixer.num_value_heads * mixer.value_head_dim
    width = mixer.q_conv1d.weight.shape[-1]
    assert sum(s.numel() for s in convolutions) == 3 * channels * (width - 1)


def check_initial_decays(mixer: Any, slowest: float) -> None:
    """Rates are uniform up to 16, softplus(dt_bias) is log-uniform between 0.001 and 0.1."""
    rates = mixer.A_log.exp()
    assert slowest <= rates.min() and rates.max() <= 16
    assert 6.5 < rates.mean() < 9.5
    steps = torch.nn.functional.softplus(mixer.dt_bias).log()
    assert math.log(0.00099) < steps.min() and steps.max() < math.log(0.101)
    assert abs(steps.mean() - (math.log(1e-3) + math.log(1e-1)) / 2) < 0.3
    assert mixer.A_log._no_weight_decay and mixer.dt_bias._no_weight_decay
