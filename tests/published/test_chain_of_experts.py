"""CoE (arXiv 2506.18945) by an explicit loop over iterations, tokens and experts, and what it must reduce to."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hf_moe
from hf_moe import CoeConfig, CoeForCausalLM, HfMoeConfig, HfMoeForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive
import test_published as published

ATTENTION = {"type": "attention"}
MOE = {
    "type": "moe",
    "num_experts": 4,
    "router": {"type": "top_k", "top_k": 2, "normalize": False},
    "experts": {"type": "swiglu", "intermediate_size": 8},
    "shared_intermediate_size": 6,
}


def build(feed_forward: dict, kind: str = "pre_norm", **overrides) -> HfMoeForCausalLM:
    block = {"type": kind, "mixer": ATTENTION, "feed_forward": feed_forward}
    torch.manual_seed(0)
    return HfMoeForCausalLM(
        HfMoeConfig(**published.SIZES, num_hidden_layers=2, blocks={"b": block}, **overrides)
    ).eval()


def chain(weights: naive.Weights, p: str, xs: list[Tensor], options: dict, losses: list) -> list[Tensor]:
    """x^t = [x^(t-1)] + S(x^(t-1)) + sum_e s^t_e E_e(x^(t-1)); returns x^C, or without what was read x^C - x^0."""
    start = xs
    for iteration in range(options["num_iterations"]):
        router = 0 if options.get("shared_router") else iteration
        logits = [weights[f"{p}gate.{router}.weight"] @ x for x in xs]
        scores = [naive.softmax(x) for x in logits]
        chosen = [naive.best(s, 2) for s in scores]
        losses.append((naive.switch(scores, chosen), naive.z_loss(logits)))
        following = []
        for x, s, experts in zip(xs, scores, chosen):
            shared = (weights[f"{p}shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
            total = naive.swiglu(x, *shared)
            for e in experts:
                gate, up = weights[f"{p}experts.gate_up_proj"][e].chunk(2)
                total = total + s[e] * naive.swiglu(x, gate, up, weights[f"{p}experts.down_proj"][e])
            following.append(x + total if options.get("inner_residual", True) else total)
        xs = following
    if options.get("include_input") or not options.get("inner_residual", True):
        return xs
    return [x - first for x, first in zip(xs, start)]


@pytest.mark.parametrize(
    "kind,options",
    [
        ("pre_norm", {"num_iterations": 2}),
        ("pre_norm", {"num_iterations": 3, "shared_router": True}),
        ("pre_norm", {"num_iterations": 2, "inner_residual": False}),
        ("pre_norm", {"num_iterations": 2, "include_input": True}),
        ("own_residual", {"num_iterations": 3, "include_input": True}),
    ],
    ids=str,
)
def test_a_chain_is_a_loop(kind, options):
    model = build({**MOE, "type": "chain_of_experts", **options}, kind, router_z_loss_coef=0.001)

    def reference(w):
        losses = []

        def layer(p, xs):
            normed = [naive.rms_norm(x, w[f"{p}input_layernorm.weight"]) for x in xs]
            wq, wk, wv, wo = (w[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
            xs = [x + wo @ y for x, y in zip(xs, naive.attention(normed, wq, wk, wv, 4, 2))]
            normed = [naive.rms_norm(x, w[f"{p}post_attention_layernorm.weight"]) for x in xs]
            outputs = chain(w, f"{p}mlp.", normed, options, losses)
            return outputs if kind == "own_residual" else [x + y for x, y in zip(xs, outputs)]

        return published.run_layers(w, 2, layer), *published.summed(losses)

    published.compare(model, reference)


@pytest.mark.parametrize("options", [{}, {"inner_residual": False}, {"shared_router": True}], ids=str)
def test_one_iteration_is_moe_exactly(options):
    expected = build(MOE)
    model = build({**MOE, "type": "chain_of_experts", "num_iterations": 1, **options})
    model.load_state_dict({n.replace("mlp.gate.", "mlp.gate.0."): p for n, p in expected.state_dict().items()})
    outputs = []
    for one in (model, expected):
        loss = one.train()(published.IDS[None], labels=published.IDS[None]).loss
        loss.backward()
        outputs.append([loss, *(p.grad for p in one.parameters())])
    assert len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))


def test_router_logits_are_kept_per_layer_and_iteration():
    model = build({**MOE, "type": "chain_of_experts", "num_iterations": 3})
    outputs = model(published.IDS[None], output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == 6 * [(6, 4)]
    assert not torch.equal(outputs.router_logits[0], outputs.router_logits[1])
    layers = list(hf_moe.moe_layers(model))
    assert [len(layer.later_gates) for layer in layers] == [2, 2]
    assert layers[0].gate is model.model.layers[0].mlp.gate[0]


def test_the_placement_of_the_paper_ends_the_stream_in_each_layer():
    model = CoeForCausalLM(tiny_config("coe", placement="paper")).eval()
    seen = {}
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.update(read=args[0], said=out[0]))
    out = model.model(published.IDS[None], output_hidden_states=True)
    assert torch.equal(model.model.norm(seen["said"]), out.last_hidden_state)  # nothing was added to it


def test_the_size_of_the_paper():
    """README of ZihanWang314/CoE: "544MB total parameters (excluding Embedding)"; that M is 2^20 is our reading."""
    with torch.device("meta"):
        model = CoeForCausalLM(CoeConfig.paper_coe_2())
    embeddings = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - embeddings == pytest.approx(544 * 2**20, rel=0.01)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_iterations": 0}, "num_iterations=0 must be at least 1"),
        ({"include_input": True, "inner_residual": False}, "include_input=True has no effect"),
        ({"router": {"type": "top_k", "top_k": 5}}, "with num_experts=4 it must be 1 to 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build({**MOE, "type": "chain_of_experts", **options})


def test_bad_placements():
    with pytest.raises(ValueError, match="returns its input"):
        build(MOE, "own_residual")
    with pytest.raises(ValueError, match="choose from"):
        tiny_config("coe", placement="post_norm")
