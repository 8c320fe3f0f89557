"""Routers that learn nothing: THOR's draws and SMoE-Dropout's frozen map; THOR's second pass and its loss."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from hf_moe import SmoeDropoutForCausalLM, ThorForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.divergence import divergence
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive
from routed_layers import EXPERTS, compare, layers, relu_expert, tokens

LOSSES = ForwardContext(losses=True)
IDS = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_frozen(top_k):
    """arXiv 2303.01610: softmax over the chosen logits of a frozen map; all experts of them are the dense model."""
    modules = layers({"type": "frozen", "top_k": top_k})
    frozen = {name for name, _ in modules.named_buffers()}
    assert frozen == {"0.gate.weight", "0.gate.bias"}
    assert not [name for name, _ in modules.named_parameters() if ".gate." in name]

    def reference(w, x):
        rows = []
        for t in x:
            logits = w["0.gate.weight"] @ t + w["0.gate.bias"]
            chosen = naive.best(logits, top_k)
            weights = naive.softmax(logits[chosen])
            rows.append(t + sum(p * relu_expert(w, "0", e, t) for p, e in zip(weights, chosen)))
        return torch.stack(rows), torch.zeros(3, dtype=torch.float64)

    compare(modules, tokens(8), LOSSES, reference)


def test_frozen_with_all_experts_is_dense():
    """k = E: no choice is left. Experts that are all alike then are one dense feed-forward, for any k."""
    (layer,) = layers({"type": "frozen", "top_k": EXPERTS})
    x = tokens(8)
    logits = x @ layer.gate.weight.T + layer.gate.bias
    each = torch.stack(
        [relu_expert(dict(layer.named_parameters(prefix="0")), "0", e, row) for row in x for e in range(4)]
    )
    dense = (logits.softmax(-1)[..., None] * each.view(8, 4, -1)).sum(1)
    torch.testing.assert_close(layer(x, None, LOSSES)[0], dense, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    for top_k in (1, 3, 4):  # `top_k` may be set between forward passes
        layer.gate.top_k = top_k
        expected = torch.stack([relu_expert(dict(layer.named_parameters(prefix="0")), "0", 0, row) for row in x])
        torch.testing.assert_close(layer(x, None, LOSSES)[0], expected, atol=1e-6, rtol=1e-6)


def test_the_frozen_router_survives_training_and_saving(tmp_path):
    torch.manual_seed(0)
    model = SmoeDropoutForCausalLM(tiny_config("smoe_dropout"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if ".gate." in name}
    assert len(before) == 4 and all(buffer.abs().max() > 0.02 for buffer in before.values())
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = SmoeDropoutForCausalLM.from_pretrained(tmp_path)
    for kept in (model, again):
        assert all(torch.equal(buffer, before[name]) for name, buffer in kept.named_buffers() if name in before)


@pytest.mark.parametrize("top_k", [1, 2])
def test_random_draws_once_for_a_forward_pass(top_k):
    """arXiv 2110.04260: in training all tokens of a pass go to the drawn expert."""
    modules = layers({"type": "random", "top_k": top_k}, depth=2)
    seen, x = set(), tokens(8)
    for seed in range(12):
        torch.manual_seed(seed)
        draws = [module.gate(x).indices for module in modules]
        assert all((draw == draw[:1]).all() for draw in draws)
        seen.add(tuple(draw[0, 0].item() for draw in draws))
    assert {first for first, _ in seen} == set(range(EXPERTS)) and len(seen) > EXPERTS  # layers draw by themselves
    torch.manual_seed(5)
    chosen = [module.gate(x).indices[0].tolist() for module in modules]

    def reference(w, x):
        rows = []
        for t in x:
            for layer, experts in enumerate(chosen):
                t = t + sum(relu_expert(w, str(layer), e, t) for e in experts) / top_k
            rows.append(t)
        return torch.stack(rows), torch.zeros(3, dtype=torch.float64)

    torch.manual_seed(5)
    compare(modules, x, LOSSES, reference)


def test_random_inference():
    (layer,) = layers({"type": "random", "inference": "token"})
    gate, x = layer.gate.eval(), tokens(4000)
    torch.manual_seed(0)
    counts = gate(x).indices.flatten().bincount(minlength=EXPERTS)
    assert (counts - 1000).abs().max() < 120
    gate.inference = "sequence"
    segments = torch.tensor([[0] * 500 + [1] * 500] * 4)  # eight sequences in four rows
    draws = gate(x, None, ForwardContext(shape=(4, 1000), segments=segments)).indices.view(8, 500)
    assert (draws == draws[:, :1]).all() and len(draws[:, 0].unique()) > 1
    gate.inference = "all"
    routing = gate(x[:3])
    assert routing.indices.tolist() == [[0, 1, 2, 3]] * 3 and routing.weights.eq(0.25).all()


def thor(**overrides) -> ThorForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_experts": 3, "initializer_range": 0.3}
    return ThorForCausalLM(tiny_config("thor", **sizes, **overrides)).train()


def test_thor_has_experts_in_every_second_layer():
    kinds = [type(layer.mlp).__name__ for layer in thor().model.layers]
    assert kinds == ["Moe", "UngatedMlp", "Moe", "UngatedMlp"]


def test_thor_trains_on_two_passes():
    """L = CE_1 + CE_2 + alpha / 2 sum (p - q)(log p - log q), by hand from two passes with the same draws."""
    model, labels = thor(consistency_loss_coef=1.5), IDS.clone()
    labels[0, 4:] = -100
    torch.manual_seed(7)
    outputs = model(IDS, labels=labels)
    outputs.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(7)
    passes = [model(IDS).logits for _ in range(2)]
    assert torch.equal(passes[0], outputs.logits) and not torch.equal(*passes)
    total, count = torch.zeros(()), 0
    for row in range(2):
        for t in range(6):
            if labels[row, t + 1] == -100:
                continue
            p, q = (naive.softmax(logits[row, t]) for logits in passes)
            total = total - torch.log(p[labels[row, t + 1]]) - torch.log(q[labels[row, t + 1]])
            total = total + 1.5 / 2 * ((p - q) * (torch.log(p) - torch.log(q))).sum()
            count += 1
    expected = total / count
    expected.backward()
    torch.testing.assert_close(outputs.loss, expected)
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], wanted, atol=1e-5, rtol=1e-4)
    torch.manual_seed(7)  # a part of a larger step: everything is divided by the step's labels
    scaled = model(IDS, labels=labels, num_items_in_batch=torch.tensor(4 * count)).loss
    torch.testing.assert_close(scaled, expected / 4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_thor_draws_the_same_when_checkpointing_repeats_a_pass(use_reentrant):
    model = thor()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    loss, expected = gradients()
    assert gradients()[0] == loss  # the seed decides
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again, actual = gradients()
    assert again == pytest.approx(loss, abs=1e-6)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_thor_evaluates_in_one_pass():
    model = thor().eval()
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    loss = model(IDS, labels=IDS).loss
    assert len(calls) == 1 and model(IDS, labels=IDS, return_dict=False)[0] == loss
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="second pass"):
        model.train()(IDS, labels=IDS, past_key_values=cache)
    model.eval()
    drawing = copy.deepcopy(model)
    for layer in drawing.model.layers[::2]:
        layer.mlp.gate.inference = "token"
    torch.manual_seed(0)
    first = drawing(IDS).logits
    assert not torch.equal(drawing(IDS).logits, first)
    torch.manual_seed(0)
    assert torch.equal(drawing(IDS).logits, first)
    assert drawing.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_thor_consistency_loss_at_its_corners():
    logits, counted = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    assert divergence("symmetric_kl", logits, logits, counted) == 0
    p, q = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]).mul(torch.tensor(3.0).log())
    # 1/2, 1/2 against 1/4, 3/4: (1/4 log 2 + 1/4 log 3/2) / 2
    wanted = 0.5 * 0.25 * (torch.tensor(2.0).log() + torch.tensor(1.5).log())
    torch.testing.assert_close(divergence("symmetric_kl", p, q, counted[:1, :1]), wanted)
    assert divergence("symmetric_kl", p, q, counted[:1, :1] & False) == 0
