"""BASED against float64 loops over its formulas: the feature maps, the linear attention, the gated convolution."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_moe import HfMoeConfig
from hf_moe.modeling.feature_maps import FEATURE_MAPS, Taylor

sys.path.insert(0, str(Path(__file__).parent))
import naive
from recurrences import build, check_rows, compare, hidden, run

HEADS, FEATURE_DIM = 4, 3


def spec(feature_map: str, **options) -> dict:
    return {"type": "based", "feature_dim": FEATURE_DIM, "feature_map": {"type": feature_map}, **options}


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    centered = x - x.mean()
    return gamma * centered / torch.sqrt((centered * centered).mean() + 1e-5) + beta


def shifted_products(x: Tensor, nu: int = 3) -> Tensor:
    parts = [max(e, torch.zeros_like(e)) for e in [*x, *(-e for e in x)]]
    size = len(parts)
    return torch.stack([parts[i] * parts[(i - shift) % size] for shift in range(1, nu + 1) for i in range(size)])


def spikes(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([naive.softmax(x @ weight), naive.softmax(-(x @ weight))])


def score(kind: str, q: Tensor, k: Tensor, w: naive.Weights, head: int) -> Tensor:
    """phi(q) . phi(k), each from its paper."""
    d = len(q)
    if kind == "taylor":
        s = q @ k / d**0.5
        return 1 + s + s * s / 2
    if kind == "elu":
        phi_q, phi_k = (torch.where(x > 0, x + 1, torch.exp(x)) for x in (q, k))
        return phi_q @ phi_k
    if kind == "relu":
        return q.clamp(min=0) @ k.clamp(min=0)
    if kind == "dpfp":
        return shifted_products(q) @ shifted_products(k)
    if kind == "hedgehog":
        return spikes(q, w["query_map.weight"][head]) @ spikes(k, w["key_map.weight"][head])
    normed = [layer_norm(x, w[f"{m}_map.gamma"], w[f"{m}_map.beta"]) for x, m in ((q, "query"), (k, "key"))]
    return (normed[0] @ normed[1]) ** 2 / d


def linear_attention(kind: str, eps: float):
    """y_t = sum_j score(q_t, k_j) v_j / (sum_j score(q_t, k_j) + eps), token by token, head by head."""

    def reference(w: naive.Weights, xs: list[Tensor]) -> list[Tensor]:
        heads = []
        for h in range(HEADS):
            q, k, v = ([w[f"{n}_proj.weight"].unflatten(0, (HEADS, -1))[h] @ x for x in xs] for n in ("q", "k", "v"))
            mixed = []
            for t in range(len(xs)):
                scores = [score(kind, q[t], k[j], w, h) for j in range(t + 1)]
                mixed.append(sum(s * v[j] for j, s in enumerate(scores)) / (sum(scores) + eps))
            heads.append(mixed)
        return [w["o_proj.weight"] @ torch.cat(parts) for parts in zip(*heads)]

    return reference


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_equals_its_formula(kind):
    # a relu map may make every score of a token zero: the eps is then all there is
    eps = 0.1 if kind == "relu" else 1e-12
    mixer = build(spec(kind, eps=eps))
    compare(mixer, linear_attention(kind, eps), tolerance=1e-7)


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_any_cut_of_the_rows(kind):
    check_rows(build(spec(kind, eps=1e-3)), tolerance=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_taylor_features_are_exact_and_few(dim):
    phi = Taylor(1, dim)
    q, k = torch.randn(2, 50, 1, 1, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = (q * k).sum(-1) / dim**0.5
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), 1 + s + s * s / 2, atol=1e-12, rtol=1e-12)
    assert phi(q).shape[-1] == phi.size == 1 + dim + dim * (dim + 1) // 2
    assert dim != 16 or phi.size == 153


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_every_map_makes_as_many_features_as_it_says(kind):
    phi = FEATURE_MAPS[kind](HEADS, 6).bfloat16()
    features = phi(torch.randn(2, 3, HEADS, 6, dtype=torch.bfloat16))
    assert features.shape == (2, 3, HEADS, phi.size) and features.dtype == torch.float32


def test_state_has_a_column_more_than_the_values():
    mixer = build({"type": "based"}, dtype=torch.bfloat16, hidden_size=64)
    states = mixer.initial_states(hidden(mixer, size=64))
    assert [state.shape for state in states] == [(1, HEADS, 153, 16 + 1)]
    _, after = run(mixer, hidden(mixer, size=64))
    assert after[0].shape == states[0].shape and after[0].dtype == states[0].dtype == torch.float32


def test_learnable_maps_start_as_their_papers_say():
    mixer = build(spec("hedgehog"))
    torch.testing.assert_close(mixer.key_map.weight, torch.eye(FEATURE_DIM).double().expand(HEADS, -1, -1))
    assert {"query_map.weight", "key_map.weight"} <= dict(mixer.named_parameters()).keys()


def convolution(kernel_size: int):
    """y = W_out (silu(conv(u1)) o u2) + b_out, [u1, u2] = W_in x + b_in."""

    def reference(w: naive.Weights, xs: list[Tensor]) -> list[Tensor]:
        u = [w["in_proj.weight"] @ x + w["in_proj.bias"] for x in xs]
        half = len(u[0]) // 2
        outputs = []
        for t in range(len(xs)):
            mixed = w.get("conv.bias", torch.zeros(half, dtype=torch.float64))
            for back in range(min(kernel_size, t + 1)):
                mixed = mixed + w["conv.weight"][:, 0, kernel_size - 1 - back] * u[t - back][:half]
            outputs.append(w["out_proj.weight"] @ (naive.silu(mixed) * u[t][half:]) + w["out_proj.bias"])
        return outputs

    return reference


@pytest.mark.parametrize("kernel_size,conv_bias", [*itertools.product((2, 3), (False, True))])
def test_short_convolution_equals_its_formula(kernel_size, conv_bias):
    mixer = build({"type": "short_convolution", "kernel_size": kernel_size, "conv_bias": conv_bias})
    assert mixer.in_proj.weight.shape == (4 * 16, 16) and mixer.out_proj.weight.shape == (16, 2 * 16)
    compare(mixer, convolution(kernel_size))
    check_rows(mixer)


@pytest.mark.parametrize(
    "mixer,message",
    [
        (spec("softmax"), "choose from"),
        (spec("taylor", feature_dim=0), "feature_dim=0"),
        (spec("taylor", eps=0.0), "eps=0.0 must be positive"),
        ({"type": "based", "feature_map": {"type": "elu", "nu": 2}}, "no option"),
        ({"type": "based", "feature_map": {"type": "dpfp", "nu": 0}}, "nu=0"),
        ({"type": "short_convolution", "expand": 0}, "expand=0"),
        ({"type": "short_convolution", "kernel_size": 1}, "kernel_size=1"),
    ],
    ids=str,
)
def test_bad_options(mixer, message):
    with pytest.raises(ValueError, match=message):
        HfMoeConfig(blocks={"b": {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 4}}})
