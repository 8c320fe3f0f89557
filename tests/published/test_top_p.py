"""Dynamic routing by cumulative probability (https://arxiv.org/abs/2403.07652)."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_moe
from hf_moe import HfMoeConfig
from hf_moe.modeling.routers.top_p import TopP, entropy_loss

sys.path.insert(0, str(Path(__file__).parent))
import naive
from mixtures import agrees, close, feed_forward, inputs


def route(p, coef=0.0, mask=None, normalize=False):
    def choose(weights, tokens):
        chosen, scores, entropies = [], [], []
        for x in tokens:
            probabilities = naive.softmax(weights["gate.weight"] @ x)
            order, total, picked = naive.best(probabilities, len(probabilities)), 0.0, []
            for number in order:
                picked.append(number)
                total += probabilities[number].item()
                if total > p:
                    break
            share = sum(probabilities[e] for e in picked) if normalize else 1
            chosen.append({e: probabilities[e] / share for e in picked})
            scores.append(probabilities)
            entropies.append(-sum(q * torch.log(q) for q in probabilities))
        real = range(len(tokens)) if mask is None else mask.flatten().nonzero().flatten().tolist()
        return chosen, scores, coef * sum(entropies[n] for n in real) / len(real)

    return choose


@pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 0.9])
def test_layer_is_the_papers(p):
    layer = feed_forward({"type": "top_p", "p": p, "entropy_loss_coef": 0.7})
    agrees(layer, route(p, 0.7), inputs())


def test_numbers_differ_and_are_the_fewest():
    layer = feed_forward({"type": "top_p", "p": 0.6})
    routing = layer.gate(inputs().flatten(0, 1))
    numbers = (routing.weights != 0).sum(-1)
    assert len(set(numbers.tolist())) > 1
    smallest = routing.weights.where(routing.weights != 0, 2).min(-1).values
    assert (routing.weights.sum(-1) > 0.6).all() and (routing.weights.sum(-1) - smallest <= 0.6).all()


def test_padding_counts_in_no_loss():
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False
    layer = feed_forward({"type": "top_p", "p": 0.5, "entropy_loss_coef": 0.7, "normalize": True})
    agrees(layer, route(0.5, 0.7, mask, normalize=True), inputs(), mask)


def test_p_of_one_is_dense():
    x = inputs().flatten(0, 1) * 30  # probabilities that round away beside others
    layer, dense = feed_forward({"type": "top_p", "p": 1.0}), feed_forward({"type": "soft"})
    routing, all_experts = layer.gate(x), dense.gate(x)
    close(torch.zeros(14, 6).scatter(1, routing.indices, routing.weights.float()), all_experts.weights.double(), 0)
    x = inputs()
    close(layer(x)[0], dense(x)[0], 1e-12)


@torch.no_grad()
def test_sums_are_not_rounded_to_bf16():
    """A sum in bf16 of 1000 shares of 0.001 would stop below 0.9 for ever, and every expert would be used."""
    router = TopP(SimpleNamespace(hidden_size=4), 0, 1000, p=0.9).bfloat16()
    torch.nn.init.zeros_(router.weight)
    used = (router(torch.randn(3, 4).bfloat16()).weights != 0).sum(-1)
    assert ((used - 900).abs() <= 2).all()


def test_entropy_of_balance_and_collapse():
    uniform, sure = torch.zeros(5, 8), torch.nn.functional.one_hot(torch.tensor([1, 1, 1, 1, 1]), 8) * 200.0
    close(entropy_loss(uniform), torch.tensor(8.0).double().log())
    close(entropy_loss(sure), torch.zeros(()).double())


def test_dynamic_moe_alternates_and_has_the_papers_size():
    """3.5 B parameters, and 581 M with two experts, if every layer is sparse (figures of the paper from memory)."""
    config = hf_moe.DynamicMoeConfig(num_hidden_layers=5)
    layers = [config.block(layer)["feed_forward"]["type"] for layer in range(5)]
    assert layers == ["moe", "mlp", "moe", "mlp", "moe"]
    with torch.device("meta"):
        model = hf_moe.DynamicMoeForCausalLM(hf_moe.DynamicMoeConfig.paper_3b())
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert abs(total / 3.5e9 - 1) < 0.01 and abs((total - routed * 14 // 16) / 581e6 - 1) < 0.01


def test_refusal():
    router = {"type": "top_p", "p": 1.5}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": {"type": "swiglu", "intermediate_size": 8}}
    with pytest.raises(ValueError, match=r"p=1.5 is a probability; use 0 .* to 1"):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})
