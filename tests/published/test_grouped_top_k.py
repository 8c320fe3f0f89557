"""Pangu Pro MoE's router (https://arxiv.org/abs/2505.21411)."""

import sys
from pathlib import Path

import pytest
import torch

import hf_moe
from hf_moe import HfMoeConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.losses import switch_loss
from hf_moe.modeling.ops.expert_groups import between_groups_loss, within_groups_loss

sys.path.insert(0, str(Path(__file__).parent))
import naive
from mixtures import agrees, feed_forward, inputs


def within(chosen, scores, groups):
    """The mean over groups of Switch's loss of a group whose scores were renormalised."""
    size, total = len(scores[0]) // groups, 0.0
    for group in range(groups):
        experts = range(group * size, (group + 1) * size)
        inside = [s[group * size : (group + 1) * size] / s[group * size : (group + 1) * size].sum() for s in scores]
        total = total + naive.switch(inside, [[e - group * size for e in row if e in experts] for row in chosen])
    return total / groups


def route(top_k, groups, normalize=False, scale=False, coef=0.0):
    def choose(weights, tokens):
        chosen, scores = [], []
        for x in tokens:
            probabilities = naive.softmax(weights["gate.weight"] @ x)
            size, picked = len(probabilities) // groups, []
            for group in range(groups):
                inside = probabilities[group * size : (group + 1) * size]
                picked += [group * size + e for e in naive.best(inside, top_k // groups)]
            share = sum(probabilities[e] for e in picked) if normalize else 1
            learned = weights["gate.router_scale"] if scale else torch.ones(len(probabilities), dtype=torch.float64)
            chosen.append({e: probabilities[e] / share * learned[e] for e in picked})
            scores.append(probabilities)
        return chosen, scores, coef * within(chosen, scores, groups)

    return choose


@pytest.mark.parametrize("top_k, groups", [(2, 2), (4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_is_the_papers(top_k, groups, normalize):
    layer = feed_forward({"type": "grouped_top_k", "top_k": top_k, "num_groups": groups, "normalize": normalize})
    agrees(layer, route(top_k, groups, normalize), inputs())


def test_learned_scale():
    layer = feed_forward({"type": "grouped_top_k", "top_k": 4, "num_groups": 2, "learned_scale": True})
    assert (layer.gate.router_scale == 1).all()
    torch.nn.init.uniform_(layer.gate.router_scale, 0.5, 2)
    agrees(layer, route(4, 2, scale=True), inputs())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_loss_inside_the_groups(groups):
    router = {"type": "grouped_top_k", "top_k": groups, "num_groups": groups, "group_loss_coef": 0.7}
    agrees(feed_forward(router), route(groups, groups, coef=0.7), inputs())


@torch.no_grad()
def test_one_group_is_top_k():
    grouped = feed_forward({"type": "grouped_top_k", "top_k": 3, "num_groups": 1})
    plain = feed_forward({"type": "top_k", "top_k": 3, "normalize": False})
    assert torch.equal(grouped(inputs())[0], plain(inputs())[0])


@torch.no_grad()
def test_every_group_works_equally():
    layer = feed_forward({"type": "grouped_top_k", "top_k": 4, "num_groups": 2})
    indices = layer.gate(inputs().flatten(0, 1) * 10).indices
    assert ((indices < 3).sum(-1) == 2).all() and ((indices >= 3).sum(-1) == 2).all()


def test_pangu_pro_moe_has_the_published_size():
    """72 B parameters, 16.5 B of them active (https://arxiv.org/abs/2505.21411)."""
    config = hf_moe.MogeConfig()
    with torch.device("meta"):
        model = hf_moe.MogeForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    active = total - routed + routed * config.num_experts_per_tok // config.num_experts
    assert abs(total / 72e9 - 1) < 0.01 and abs(active / 16.5e9 - 1) < 0.01


def test_loss_at_balance_and_collapse():
    """E = 6, M = K = 2: uniform scores and loads give 1, two experts that get everything give E/K."""
    balanced = torch.tensor([[0, 3], [1, 4], [2, 5]])
    assert switch_loss(torch.full((3, 6), 1 / 6), balanced, torch.ones(3, 2)).isclose(torch.tensor(1.0))
    collapsed = torch.tensor([[0.5, 0, 0, 0.5, 0, 0]] * 3)
    assert switch_loss(collapsed, torch.tensor([[0, 3]] * 3), torch.ones(3, 2)).isclose(torch.tensor(3.0))


def test_group_losses_at_balance_and_collapse():
    """E = 6, G = 2."""
    balanced, ones, uniform = torch.tensor([[0, 3], [1, 4], [2, 5]]), torch.ones(3, 2), torch.full((3, 6), 1 / 6)
    one_each, fixed = torch.tensor([[0.5, 0, 0, 0.5, 0, 0]] * 3), torch.tensor([[0, 3]] * 3)
    one_group, first = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]] * 3), torch.tensor([[0, 1], [1, 2], [2, 0]])
    values = {
        1.0: [between_groups_loss(uniform, balanced, ones, 2), between_groups_loss(one_each, fixed, ones, 2)]
        + [within_groups_loss(uniform, balanced, ones, 2)],
        2.0: [between_groups_loss(one_group, first, ones, 2)],
        3.0: [within_groups_loss(one_each, fixed, ones, 2)],
    }
    for expected, losses in values.items():
        for loss in losses:
            torch.testing.assert_close(loss, torch.tensor(expected))


def test_device_level_loss_is_deepseeks():
    """`sum_g f'_g P'_g`: the mean over a group of f = E count / (K T), times the sum of its mean scores."""
    layer = feed_forward({"type": "top_k", "top_k": 2, "num_groups": 3, "groups_per_token": 3, "group_loss_coef": 0.5})
    x = inputs()
    tokens = list(x.flatten(0, 1))
    weights = naive.double(layer)
    scores = [naive.softmax(weights["gate.weight"] @ token) for token in tokens]
    chosen = [naive.best(s, 2) for s in scores]
    expected = 0.0
    for group in ([0, 1], [2, 3], [4, 5]):
        f = sum(6 * sum(row.count(e) for row in chosen) / (2 * len(tokens)) for e in group) / 2
        expected = expected + f * sum(sum(s[e] for e in group) for s in scores) / len(scores)
    loss = layer(x, None, ForwardContext(losses=True))[2][2]
    torch.testing.assert_close(loss.double(), 0.5 * expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    (0.5 * expected).backward()
    torch.testing.assert_close(layer.gate.weight.grad, weights["gate.weight"].grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_groups": 4, "top_k": 4}, r"num_groups=4 does not divide 6 experts; use one of \[1, 2, 3, 6\]"),
        ({"num_groups": 0, "top_k": 4}, r"num_groups=0 does not divide 6 experts; use one of \[1, 2, 3, 6\]"),
        ({"num_groups": 3, "top_k": 2}, r"top_k=2 is not the same number .* use one of \[3, 6\]"),
        ({"num_groups": 2, "top_k": 8}, r"top_k=8 is not the same number .* use one of \[2, 4, 6\]"),
    ],
)
def test_refusals(options, message):
    router, experts = {"type": "grouped_top_k", **options}, {"type": "swiglu", "intermediate_size": 8}
    spec = {"type": "moe", "num_experts": 6, "router": router, "experts": experts}
    with pytest.raises(ValueError, match=message):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})
