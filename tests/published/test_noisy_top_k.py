"""Noisy top-k gating with fixed draws, against the formulas of https://arxiv.org/abs/1701.06538 (§2.1, A)."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.losses import importance_load
from hf_moe.modeling.routers import NoisyTopK

sys.path.insert(0, str(Path(__file__).parent))
import naive

TOKENS, WIDTH, EXPERTS = 7, 6, 5


def router(**options) -> NoisyTopK:
    gate = NoisyTopK(SimpleNamespace(hidden_size=WIDTH), 0, EXPERTS, top_k=2, **options).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return gate


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def clean_logits(gate: NoisyTopK, x: torch.Tensor, network: str) -> torch.Tensor:
    if network == "linear":
        return gate.get_parameter("gate_network.weight") @ x
    return gate.get_parameter("gate_network.2.weight") @ torch.tanh(gate.get_parameter("gate_network.0.weight") @ x)


def draw_again(gate: NoisyTopK, network: str, draws: torch.Tensor):
    """Logits, weights by expert, and chances, token by token."""
    rows = []
    for x, draw in zip(tokens(), draws):
        clean = clean_logits(gate, x, network)
        spread = torch.log(1 + torch.exp(gate.get_parameter("weight_noise.weight") @ x)) + gate.noise_epsilon
        noisy = clean + spread * draw
        chosen = naive.best(noisy, 2)
        weights = dict(zip(chosen, gate.scale * naive.softmax(noisy[chosen])))
        chances = []
        for e in range(EXPERTS):
            others = sorted((noisy[o] for o in range(EXPERTS) if o != e), key=lambda v: -v.item())
            z = (clean[e] - others[1]) / spread[e]
            chances.append((1 + torch.erf(z / math.sqrt(2))) / 2)
        rows.append((noisy, weights, torch.stack(chances)))
    return rows


def cv_squared(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.mean()) ** 2).sum() / (len(x) - 1) / x.mean() ** 2


@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_training(network):
    gate = router(network=network, scale=2.5, noise_epsilon=0.3).train()
    torch.manual_seed(3)
    routing = gate(tokens())
    torch.manual_seed(3)
    rows = draw_again(gate, network, torch.randn(TOKENS, EXPERTS, dtype=torch.float64))
    importance = torch.zeros(EXPERTS, dtype=torch.float64)
    for n, (logits, weights, chances) in enumerate(rows):
        torch.testing.assert_close(routing.logits[n], logits)
        assert routing.indices[n].tolist() == list(weights)
        torch.testing.assert_close(routing.weights[n], torch.stack(list(weights.values())), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(routing.chances[n], chances)
        importance = importance.index_add(0, torch.tensor(list(weights)), torch.stack(list(weights.values())))
    expected = cv_squared(importance) + cv_squared(sum(chances for *_, chances in rows))
    context = ForwardContext(shape=(1, TOKENS), balance="importance_load")
    actual = gate.losses(routing, context)[0]
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    parameters = list(gate.parameters())
    for ours, theirs in zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_chances_are_how_often_an_expert_is_chosen():
    """Its own noise drawn anew, the others' kept: the definition of P, by counting."""
    gate = router(noise_epsilon=0.3).train()
    torch.manual_seed(3)
    routing = gate(tokens())
    generator = torch.Generator().manual_seed(4)
    for n, e in ((0, 0), (1, 3), (2, 4), (5, 1)):
        x = tokens()[n]
        spread = torch.nn.functional.softplus(gate.get_parameter("weight_noise.weight") @ x)[e] + 0.3
        own = clean_logits(gate, x, "linear")[e] + spread * torch.randn(20000, generator=generator)
        others = routing.logits[n][[o for o in range(EXPERTS) if o != e]].sort(descending=True).values
        assert (own > others[1]).double().mean().item() == pytest.approx(routing.chances[n, e].item(), abs=0.015)


def test_evaluation_and_gates_without_noise_draw_nothing():
    for gate in (router().eval(), router(noise=False).train()):
        routing = gate(tokens())
        for n, x in enumerate(tokens()):
            logits = clean_logits(gate, x, "linear")
            torch.testing.assert_close(routing.logits[n], logits)
            assert routing.indices[n].tolist() == naive.best(logits, 2)
        assert routing.chances is None and torch.equal(gate(tokens()).weights, routing.weights)


def test_without_chances_the_load_is_counted():
    gate = router(noise=False).train()
    routing = gate(tokens())
    counts, importance = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    for indices, weights in zip(routing.indices.tolist(), routing.weights.tolist()):
        for e, weight in zip(indices, weights):
            counts[e] += 1
            importance[e] += weight
    actual = importance_load(routing.logits.float(), routing.indices, routing.weights, ForwardContext())
    torch.testing.assert_close(actual, cv_squared(counts) + cv_squared(importance), atol=1e-5, rtol=1e-5)


def test_noise_starts_equal_for_all_experts():
    gate = router()
    gate.init_weights(0.02)
    assert not gate.get_parameter("weight_noise.weight").any()
    assert gate.get_parameter("gate_network.weight").any()


@pytest.mark.parametrize(
    "options, message",
    [({"network": "deep"}, "network='deep' is unknown"), ({"noise_epsilon": 0.0}, "noise_epsilon=0.0 is a standard")],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        NoisyTopK.check(None, **{"network": "linear", "noise_epsilon": 0.01, **options})
