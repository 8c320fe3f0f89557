"""Spark attention against a float64 loop over queries; statistical top-k against Gemma 3n and against its formula."""

import math
import sys
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from hf_moe import MIXERS
from hf_moe.modeling.ops.statistical_top_k import (
    passes_statistical_top_k,
    statistical_threshold,
    statistical_top_k,
)
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HEAD, HEADS, KEY_HEADS, TIME = 16, 8, 4, 2, 9


def config(**options):
    spec = {"mixer": {"type": "spark_attention", **options}, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=HEAD, blocks={"b": spec})


def build(**options) -> torch.nn.Module:
    """The mixer alone, in float64, with weights large enough to matter."""
    tiny = config(**options)
    torch.manual_seed(0)
    parts = dict(tiny.block(0)["mixer"])
    mixer = MIXERS[parts.pop("type")](tiny, 0, **parts).double().eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer


def inputs(start: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Hidden states, cosines and sines from position `start` on, and the causal mask."""
    hidden_states = torch.randn(1, TIME, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = torch.outer(torch.arange(start, start + TIME, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    mask = torch.ones(1, 1, TIME, TIME, dtype=torch.bool).tril()
    return hidden_states, (angles.cos(), angles.sin()), mask


def turn(x: Tensor, position: int, frequencies: list[float]) -> Tensor:
    """Rotate pair (i, i + w/2) of a part of width w by position times its frequency."""
    first, second = x.chunk(2)
    angles = position * torch.tensor(frequencies, dtype=torch.float64)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def frequencies(rank: int, rotary: str) -> tuple[list[float] | None, list[float] | None]:
    head = [10000.0 ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    if rotary == "head":
        return head[: rank // 2], head[rank // 2 :]
    own = [[10000.0 ** (-2 * i / size) for i in range(size // 2)] for size in (rank, HEAD - rank)]
    return {"parts": (own[0], own[1]), "predictor": (own[0], None), "none": (None, None)}[rotary]


def reference(w: naive.Weights, xs: Tensor, top_k: int, rank: int, scale: str, rotary: str) -> Tensor:
    """One query and one head at a time."""
    turns = frequencies(rank, rotary)
    widths = {"head": (HEAD, HEAD), "parts": (rank, HEAD - rank), "none": (1, 1)}[scale]

    def parts(name: str, h: int, t: int) -> list[Tensor]:
        head = (w[f"{name}_proj.weight"] @ xs[t])[h * HEAD : (h + 1) * HEAD]
        return [x if f is None else turn(x, t, f) for x, f in zip((head[:rank], head[rank:]), turns)]

    outputs = []
    for t in range(len(xs)):
        mixed = []
        for h in range(HEADS):
            m, query = h // (HEADS // KEY_HEADS), parts("q", h, t)
            keys = [parts("k", m, j) for j in range(t + 1)]
            s1, s2 = (torch.stack([query[p] @ k[p] for k in keys]) / math.sqrt(widths[p]) for p in (0, 1))
            number, kept = t + 1, list(range(t + 1))
            if number > top_k:
                mean = sum(s1) / number
                deviation = torch.sqrt(sum((s - mean) ** 2 for s in s1) / number)
                theta = mean + deviation * NormalDist().inv_cdf(1 - top_k / number)
                kept = [j for j in kept if s1[j] >= theta] or [int(s1.argmax())]
            shares = naive.softmax(s1[kept])
            strengths = torch.log(1 + torch.exp(s2))
            values = [(w["v_proj.weight"] @ xs[j])[m * HEAD : (m + 1) * HEAD] for j in kept]
            mixed.append(sum(a * strengths[j] * v for a, j, v in zip(shares, kept, values)))
        outputs.append(w["o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_k": 3, "scale": "parts"},
        {"top_k": 3, "scale": "none"},
        {"top_k": 1, "rotary": "head"},
        {"top_k": 4, "rotary": "none", "predictor_size": 3},
        {"top_k": 2, "rotary": "predictor", "predictor_size": 2},
        {"top_k": 3, "rotary": "head", "predictor_size": 2, "scale": "parts"},
        {"top_k": 100},
    ],
    ids=str,
)
def test_equals_the_loop_forward_and_backward(options):
    mixer, (hidden_states, tables, mask) = build(**options), inputs()
    hidden_states.requires_grad_()
    xs, weights = hidden_states[0].detach().requires_grad_(), naive.double(mixer)
    ours = mixer(hidden_states, tables, mask)[0][0]
    filled = {"predictor_size": HEAD // 2, "scale": "head", "rotary": "parts", **options}
    rank = filled.pop("predictor_size")
    expected = reference(weights, xs, rank=rank, **filled)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(hidden_states.grad[0], xs.grad)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("rotary", ["parts", "head", "predictor", "none"])
def test_only_distances_matter(rotary):
    """Pairs do not straddle the cut: the same tokens anywhere give the same output."""
    mixer = build(top_k=3, rotary=rotary)
    here, there = (mixer(*inputs(start))[0] for start in (0, 1000))
    torch.testing.assert_close(here, there)


@torch.no_grad()
def test_weights_are_sparse():
    hidden_states, tables, mask = inputs()
    weights = build(top_k=3)(hidden_states, tables, mask)[1]
    attended = (weights > 0).sum(-1)
    assert attended[..., :3].tolist() == [[[1, 2, 3]] * HEADS]  # no more than k visible: all of them
    assert (attended >= 1).all() and attended[..., 5:].float().mean() < 4.5
    assert not (weights * ~mask).any()


@torch.no_grad()
def test_a_token_that_sees_nothing_gets_nothing():
    hidden_states, tables, mask = inputs()
    mask[..., 4, :] = False
    output, weights, losses = build(top_k=3)(hidden_states, tables, mask)
    assert not output[:, 4].any() and output.isfinite().all() and not weights[:, :, 4].any() and losses is None


@pytest.mark.parametrize("sparsity", [0.95, 0.5, 0.1])
def test_soft_top_k_is_gemma_3n(sparsity):
    scores = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = statistical_top_k(scores, round(1000 * (1 - sparsity)))
    gemma = Gemma3nTextMLP._gaussian_topk(SimpleNamespace(activation_sparsity=sparsity), scores)
    torch.testing.assert_close(ours, gemma, atol=2e-6, rtol=1e-5)
    (mine,), (theirs,) = (torch.autograd.grad(x.square().sum(), scores) for x in (ours, gemma))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_about_k_of_n_gaussian_scores_pass():
    scores = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0)) * 3 + 7
    visible = torch.ones_like(scores, dtype=torch.bool)
    for k in (16, 256, 2048):
        passed = passes_statistical_top_k(scores, k, visible).sum(-1).float().mean()
        assert abs(passed - k) < 0.05 * k


def test_moments_are_of_the_visible_scores_only():
    generator = torch.Generator().manual_seed(0)
    scores, visible = torch.randn(4, 30, generator=generator), torch.rand(4, 30, generator=generator) < 0.6
    threshold = statistical_threshold(scores.masked_fill(~visible, 1e4), 5, visible)
    for row, seen, theta in zip(scores, visible, threshold):
        torch.testing.assert_close(statistical_threshold(row[seen], 5), theta)
        mean, std = row[seen].double().mean(), row[seen].double().std(unbiased=False)
        formula = mean + std * NormalDist().inv_cdf(1 - 5 / int(seen.sum()))
        torch.testing.assert_close(theta.double()[0], formula, atol=1e-5, rtol=1e-5)


def test_moments_are_fp32():
    scores = (torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) * 0.1 + 100).bfloat16()
    expected = statistical_threshold(scores.double(), 100)
    assert statistical_threshold(scores, 100).dtype == torch.float32
    torch.testing.assert_close(statistical_threshold(scores, 100).double(), expected, atol=1e-4, rtol=0)


def test_edges_of_the_threshold():
    scores = torch.tensor([[0.0] * 9 + [1.0], [2.0] * 10, list(range(10))], requires_grad=True)
    visible = torch.ones(3, 10, dtype=torch.bool)
    assert (statistical_threshold(scores, 10, visible) == -math.inf).all()  # no more than k: keep all
    assert passes_statistical_top_k(scores, 10, visible).all()
    # half of the scores one deviation above the mean: none reaches a threshold of more deviations, the largest stays
    halves = torch.tensor([[-1.0, 1.0] * 50])
    assert statistical_threshold(halves, 5) > 1
    assert passes_statistical_top_k(halves, 5, torch.ones_like(halves, dtype=torch.bool)).sum() == 50
    assert passes_statistical_top_k(scores, 2, visible)[1].all()  # equal scores stay or fall together
    statistical_top_k(scores, 2).sum().backward()
    assert scores.grad.isfinite().all()  # also where the deviation is zero
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"top_k={k} of 10 scores"):
            statistical_top_k(scores, k)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"top_k": 0}, "top_k=0: a query attends to at least one key"),
        ({"predictor_size": 0}, "predictor_size=0 must be between 1 and head_dim - 1 = 7"),
        ({"predictor_size": 8}, "predictor_size=8 must be between"),
        ({"predictor_size": 3}, "needs parts of even size; a head is cut into 3 and 5"),
        ({"scale": "keys"}, "scale='keys' must be one of"),
        ({"rotary": "all"}, "rotary='all' one of"),
    ],
    ids=str,
)
def test_bad_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
