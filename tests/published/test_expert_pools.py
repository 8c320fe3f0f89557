"""ReXMoE (arXiv 2510.17483): layers of a pool share their experts; candidates grow during training."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive
import test_published as published

N, LAYERS = 3, 4
SPEC = {
    "type": "pooled_moe",
    "num_experts": N,
    "router": {"type": "top_k", "top_k": 2, "normalize": False},
    "experts": {"type": "swiglu", "intermediate_size": 8},
}


def build(feed_forward: dict, layers: int = LAYERS, **overrides) -> HfMoeForCausalLM:
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}}
    torch.manual_seed(0)
    return HfMoeForCausalLM(
        HfMoeConfig(**published.SIZES, num_hidden_layers=layers, **{"blocks": blocks, **overrides})
    ).eval()


def reference(weights: naive.Weights, layers_per_pool: int, before: bool = False, candidates=None) -> tuple:
    """Logits and losses; `candidates[layer]` (r N,) which experts may be chosen.

    before: mask logits before the softmax; otherwise zero scores after it, as in eq. 6.
    """
    losses = []

    def layer(p, xs):
        normed = [naive.rms_norm(x, weights[f"{p}input_layernorm.weight"]) for x in xs]
        wq, wk, wv, wo = (weights[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
        xs = [x + wo @ y for x, y in zip(xs, naive.attention(normed, wq, wk, wv, 4, 2))]
        normed = [naive.rms_norm(x, weights[f"{p}post_attention_layernorm.weight"]) for x in xs]
        return [x + y for x, y in zip(xs, routed(p, normed))]

    def routed(p: str, xs: list[Tensor]) -> list[Tensor]:
        number = int(p.split(".")[2])
        pool = f"model.shared.pools.{number // layers_per_pool}.mlp.experts."
        logits = [weights[f"{p}mlp.gate.weight"] @ x for x in xs]
        scores, outputs, chosen = [naive.softmax(x) for x in logits], [], []
        for x, s in zip(xs, scores):
            allowed = [e for e in range(len(s)) if candidates is None or candidates[number][e]]
            chosen.append(sorted(allowed, key=lambda e: -s[e].item())[:2])
            w = s / sum(s[e] for e in allowed) if before else s
            total = torch.zeros_like(x)
            for e in chosen[-1]:
                gate, up = weights[f"{pool}gate_up_proj"][e].chunk(2)
                total = total + w[e] * naive.swiglu(x, gate, up, weights[f"{pool}down_proj"][e])
            outputs.append(total)
        losses.append((naive.switch(scores, chosen), naive.z_loss(logits)))
        return outputs

    return published.run_layers(weights, LAYERS, layer), *published.summed(losses)


@pytest.mark.parametrize("layers_per_pool", [1, 2, 4])
def test_pools(layers_per_pool):
    model = build({**SPEC, "layers_per_pool": layers_per_pool}, router_z_loss_coef=0.001)
    published.compare(model, lambda weights: reference(weights, layers_per_pool))


@pytest.mark.parametrize("before", [False, True])
def test_the_own_experts_come_first(before):
    model = build({**SPEC, "layers_per_pool": 2, "masking": "own_first", "mask_before_softmax": before})
    for layer in model.model.layers:
        layer.mlp.num_candidates = N + 1
    first, second = [True] * (N + 1) + [False] * (N - 1), [True] + [False] * (N - 1) + [True] * N
    candidates = [first, second, first, second]
    published.compare(model, lambda weights: reference(weights, 2, before, candidates))


def test_random_candidates_are_drawn_in_training_only():
    model = build({**SPEC, "layers_per_pool": 2})
    expected = model(published.IDS[None]).logits
    drawn = []
    for layer in model.model.layers:
        layer.mlp.num_candidates = N + 1
        layer.mlp.gate.register_forward_pre_hook(lambda _, args: drawn.append(args[2].candidates))
    assert torch.equal(model(published.IDS[None]).logits, expected) and drawn == [None] * LAYERS
    drawn.clear()
    model.set_experts_implementation("batched_mm")
    logits = model.double().train()(published.IDS[None], use_cache=False).logits[0]
    assert [mask.sum().item() for mask in drawn] == [N + 1] * LAYERS
    weights = naive.double(model)
    expected = reference(weights, 2, candidates=drawn)[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weights[name])
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    masks = torch.stack([model.model.layers[0].mlp.candidates(torch.device("cpu")) for _ in range(600)]).double()
    assert (masks.sum(1) == N + 1).all()
    assert (masks.mean(0) - (N + 1) / (2 * N)).abs().max() < 0.1  # nothing protects the layer's own experts


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_draw(use_reentrant):
    model = build({**SPEC, "layers_per_pool": 2}).train()
    for layer in model.model.layers:
        layer.mlp.num_candidates = N
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        model(published.IDS[None], labels=published.IDS[None], use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masking", ["random", "own_first"])
def test_growing_candidates_do_not_compile_again(masking):
    model = build({**SPEC, "layers_per_pool": 2, "masking": masking}).train()
    layers = model.model.layers
    for layer in layers:
        layer.mlp.num_candidates = N
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number in (N, N + 1, N + 2):
        for layer in layers:
            layer.mlp.num_candidates = number
        compiled(published.IDS[None], use_cache=False)
    assert counter.frame_count == 1


def test_a_pool_of_one_layer_is_moe_exactly():
    expected = build({**SPEC, "type": "moe"})
    model = build({**SPEC, "layers_per_pool": 1})

    def ours(name: str) -> str:
        return re.sub(r"layers\.(\d+)\.mlp\.experts", r"shared.pools.\1.mlp.experts", name)

    weights = {ours(name): tensor for name, tensor in expected.state_dict().items()}
    model.load_state_dict(weights)
    results = []
    for one in (model, expected):
        loss = one.train()(published.IDS[None], labels=published.IDS[None]).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in one.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        assert torch.equal(gradient, results[0][1][ours(name)])


def test_every_expert_is_saved_once(tmp_path):
    from safetensors import safe_open

    model = build({**SPEC, "layers_per_pool": 2})
    shared = [name for name, _ in model.named_parameters() if "experts" in name]
    assert len(shared) == 4  # two tensors for each of two pools
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if "experts" in key]  # noqa: SIM118 - not a dict
    assert len(keys) == 2 * 3 * 2 * N  # a pool's three matrices of 2 N experts
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(published.IDS[None]).logits, model(published.IDS[None]).logits)


def test_tools_see_the_pool_through_every_layer():
    layers = list(hf_moe.moe_layers(build({**SPEC, "layers_per_pool": 2})))
    assert [layer.num_experts for layer in layers] == [2 * N] * LAYERS
    assert layers[0].experts is layers[1].experts and layers[1].experts is not layers[2].experts


def test_other_layers_may_stand_between():
    """The layers of a pool are consecutive among those of this kind."""
    dense = {"mixer": {"type": "attention"}, "feed_forward": {"type": "mlp", "intermediate_size": 8}}
    pooled = {"mixer": {"type": "attention"}, "feed_forward": {**SPEC, "layers_per_pool": 2}}
    model = build({}, blocks={"dense": dense, "pooled": pooled}, block_pattern=["dense", "pooled"])
    assert [layer.mlp.pool for layer in model.model.layers[1::2]] == [0, 0] and len(model.model.shared["pools"]) == 1
    assert [layer.mlp.first_own for layer in model.model.layers[1::2]] == [0, N]
    model(published.IDS[None])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers_per_pool": 3}, r"does not divide 4 layers of pooled_moe; use one of \[1, 2, 4\]"),
        ({"layers_per_pool": 0}, r"use one of \[1, 2, 4\]"),
        ({"masking": "nearest"}, r"choose from \['random', 'own_first'\]"),
        ({"router": {"type": "top_k", "top_k": 7}}, "with num_experts=6 it must be 1 to 6"),
        ({"router": {"type": "top_k"}, "mask_before_softmax": True}, "has an effect only"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build({**SPEC, **options})


def test_bad_numbers_of_candidates():
    layer = build(SPEC).model.layers[0].mlp
    for number in (1, 7):
        with pytest.raises(ValueError, match=r"must be 2 \(top_k\) to 6"):
            layer.num_candidates = number
    layer.num_candidates = 6
    assert layer.num_candidates is None  # all
    recurrent = build({**SPEC, "router": {"type": "recurrent", "state_size": 4}}).model.layers[0].mlp
    with pytest.raises(ValueError, match="cannot leave experts out"):
        recurrent.num_candidates = 4


def test_the_architecture_refuses_pools_that_do_not_fit():
    with pytest.raises(ValueError, match="does not divide"):
        tiny_config("rexmoe", num_hidden_layers=3)
