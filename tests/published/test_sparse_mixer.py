"""SparseMixer: GRIN (https://arxiv.org/abs/2409.12136) and Uni-MoE-2.0 (https://arxiv.org/abs/2511.12609)."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.routers import SparseMixer

sys.path.insert(0, str(Path(__file__).parent))
import naive
from mixtures import agrees, feed_forward, inputs

JITTER = 0.2  # wide, so that picks have rivals


def pick(logits, left):
    """The best of `left` and its weight among its near rivals."""
    best = max(left, key=lambda e: logits[e].item())
    top = logits[best].item()
    near = [e for e in left if (top - logits[e].item()) / max(abs(logits[e].item()), abs(top)) <= 2 * JITTER]
    return best, torch.exp(logits[best] - top) / sum(torch.exp(logits[e] - top) for e in near)


def route(picks, top_p=None, normalize=False, always=(), null=()):
    def choose(weights, tokens):
        chosen, scores = [], []
        for x in tokens:
            logits = weights["gate.weight"] @ x
            left = [e for e in range(len(logits)) if e not in always]
            probabilities = naive.softmax(logits[left])
            number = picks
            if top_p is not None:
                total, number = 0.0, 0
                for value in sorted(probabilities.tolist(), reverse=True):
                    total, number = total + value, number + 1
                    if total >= top_p or number == picks:
                        break
            row = {}
            for _ in range(number):
                best, weight = pick(logits, left)
                row[best] = weight
                left.remove(best)
            if normalize:
                total = sum(row.values()) + 1e-6
                row = {e: weight / total for e, weight in row.items()}
            if always:
                joint = torch.exp(logits) / sum(torch.exp(logits[e]) for e in (*row, *always))
                share = sum(joint[e] for e in row)
                row = {e: weight * share for e, weight in row.items()} | {e: joint[e] for e in always}
            chosen.append(row)
            scores.append(probabilities)
        return chosen, [] if always else scores, 0.0

    return choose


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_without_draws(top_k, normalize):
    router = {"type": "sparse_mixer", "top_k": top_k, "jitter": JITTER, "sample": False, "normalize": normalize}
    agrees(feed_forward(router), route(top_k, normalize=normalize), inputs())


@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("top_k", [2, 7])
def test_dynamic_capacity_with_a_null_expert(top_p, top_k):
    options = {"jitter": JITTER, "sample": False, "normalize": True, "top_p": top_p, "top_k": top_k}
    layer = feed_forward({"type": "sparse_mixer", **options}, num_zero_experts=1, zero_expert_type="null")
    agrees(layer, route(top_k, top_p, True), inputs())


def test_uni_moe_with_experts_for_every_token():
    """4 routed experts, 2 for every token, 1 null; the balance loss sees the 5 that are picked."""
    options = {"jitter": JITTER, "sample": False, "normalize": True, "top_p": 0.7, "top_k": 5, "always_experts": 2}
    layer = feed_forward({"type": "sparse_mixer", **options}, num_zero_experts=1, zero_expert_type="null")
    choose, losses = route(5, 0.7, True, always=(4, 5)), layer.gate.losses
    seen = []
    layer.gate.losses = lambda routing, context: seen.append(routing) or losses(routing, context) * 0
    agrees(layer, choose, inputs())
    (routing,) = seen
    weights = naive.double(layer)
    chosen, _, _ = choose(weights, list(inputs().flatten(0, 1)))
    logits = [(weights["gate.weight"] @ x)[[0, 1, 2, 3, 6]] for x in inputs().flatten(0, 1)]
    renamed = {0: 0, 1: 1, 2: 2, 3: 3, 6: 4}
    expected = naive.switch(
        [naive.softmax(x) for x in logits], [[renamed[e] for e in row if e in renamed] for row in chosen]
    )
    actual = losses(routing, ForwardContext(losses=True))[0]
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-5)


class Fixed(torch.Tensor):
    """A draw that the native code cannot draw again: it does so for its second pick."""

    def uniform_(self, *args):
        return self


@pytest.mark.parametrize("training", [False, True])
def test_grin_is_phimoes(monkeypatch, training):
    """Same draws, same weights, same gradients. Phi's 0.3333 for 1/3 is what the tolerance is for."""
    draw = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda x: draw(x.as_subclass(torch.Tensor)).as_subclass(Fixed))
    torch.manual_seed(0)
    router = SparseMixer(SimpleNamespace(hidden_size=8), 0, 6, jitter=JITTER).train(training)
    router.init_weights(0.5)
    tokens, upstream, results = torch.randn(400, 8), torch.randn(400, 2), []
    for native in (True, False):
        torch.manual_seed(1)
        x = tokens.clone().requires_grad_()
        if native:
            weights, indices = sparsemixer(torch.nn.functional.linear(x, router.weight), JITTER, training)
        else:
            _, weights, indices = router(x)[:3]
        weights = weights.as_subclass(torch.Tensor)
        (grad,) = torch.autograd.grad((weights * upstream).sum(), x)
        results.append((weights, indices, grad))
    (weights, indices, grad), ours = results
    if training:
        assert (indices[:, 0] != (tokens @ router.weight.T).argmax(-1)).float().mean() > 0.05, (
            "some draws miss the best"
        )
    assert torch.equal(ours[1], indices)
    torch.testing.assert_close(ours[0], weights, atol=1e-4, rtol=2e-4)
    torch.testing.assert_close(ours[2], grad, atol=1e-5, rtol=1e-4)


def test_draws_follow_the_rivals_softmax():
    """And their mean weight is the Heun estimate: 1 for the best, 1/3 + 2/3 / 4 = 1/2 of it for another."""
    torch.manual_seed(0)
    router = SparseMixer(SimpleNamespace(hidden_size=3), 0, 3, top_k=1, jitter=0.2).train()
    logits = torch.tensor([2.0, 1.6, 0.5])  # 0.5 is too far to be a rival
    torch.nn.init.zeros_(router.weight).data.fill_diagonal_(1.0)
    _, weights, indices = router(logits.expand(20000, 3))[:3]
    first = 1 / (1 + math.exp(-0.4))
    frequency = torch.bincount(indices.flatten(), minlength=3) / 20000
    torch.testing.assert_close(frequency, torch.tensor([first, 1 - first, 0]), atol=0.015, rtol=0)
    assert torch.allclose(weights[indices == 0], torch.tensor(first))
    assert abs(weights[indices == 1].mean() / (1 - first) - 0.5) < 0.02


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_draws(use_reentrant):
    router = {"type": "sparse_mixer", "top_k": 2, "jitter": JITTER}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": {"type": "swiglu", "intermediate_size": 8}}
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": spec}}
    config = HfMoeConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, blocks=blocks)
    torch.manual_seed(0)
    model, ids, grads = HfMoeForCausalLM(config).train(), torch.arange(40).view(2, 20), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 5}, r"is 5; with num_experts=4 it must be 1 to 4"),
        ({"top_k": 3, "always_experts": 2}, r"is 3; with num_experts=2 it must be 1 to 2"),
        ({"always_experts": 4}, r"always_experts=4; with 4 experts it must be 0 to 3"),
        ({"top_p": 0.0}, r"top_p=0.0 is a sum of probabilities; use one above 0 and up to 1, or None"),
        ({"jitter": -0.1}, r"jitter=-0.1 is a distance"),
    ],
)
def test_refusals(options, message):
    router, experts = {"type": "sparse_mixer", **options}, {"type": "swiglu", "intermediate_size": 8}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": experts}
    with pytest.raises(ValueError, match=message):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})
