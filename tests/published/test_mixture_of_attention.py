"""Mixture of attention heads against a float64 loop over tokens and heads, and against Transformers' JetMoE."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

from hf_moe import MIXERS, HfMoeConfig, HfMoeForCausalLM, MoaConfig, MoaForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HEAD, TIME = 16, 8, 6
ROUTERS = {
    "released": {"normalize": False},
    "normalized": {"normalize": True},
    "jetmoe": {"scoring": "softmax_selected"},
}


def spec(num_experts: int = 4, top_k: int = 2, router: str = "released", **options) -> dict:
    return {
        "type": "mixture_of_attention",
        "num_experts": num_experts,
        "router": {"type": "top_k", "top_k": top_k, **ROUTERS[router]},
        **options,
    }


def tiny(mixer: dict, feed_forward: dict | None = None, **sizes) -> HfMoeConfig:
    block = {"mixer": mixer, "feed_forward": feed_forward or {"type": "mlp", "intermediate_size": 24}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=HEAD, blocks={"b": block}, **sizes)


def build(implementation: str = "batched_mm", **options) -> torch.nn.Module:
    """The mixer alone, with weights large enough for every one of them to matter."""
    config = tiny(spec(**options))
    config._attn_implementation, config._experts_implementation = "sdpa", implementation
    torch.manual_seed(0)
    parts = dict(config.block(0)["mixer"])
    mixer = MIXERS[parts.pop("type")](config, 0, **parts)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer


def inputs(batch: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states, and the cosines and sines of their positions."""
    hidden_states = torch.randn(batch, TIME, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = torch.outer(torch.arange(TIME, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    return hidden_states.to(dtype), (angles.cos().to(dtype), angles.sin().to(dtype))


def reference(
    xs: list[Tensor], w: naive.Weights, heads: int, top_k: int, router: str, rotary: bool, real: list[int]
) -> tuple[Tensor, Tensor]:
    """y_t = sum_e w_te sum_h Wo_eh softmax(q_teh K_h / sqrt(d)) V_h, one expert, one head, one token at a time."""
    turn = naive.rotate if rotary else lambda x, position: x
    part = [slice(h * HEAD, (h + 1) * HEAD) for h in range(heads)]
    keys = [[turn((w["k_proj.weight"] @ x)[p], t) for p in part] for t, x in enumerate(xs)]
    values = [[(w["v_proj.weight"] @ x)[p] for p in part] for x in xs]
    logits = [w["gate.weight"] @ x for x in xs]
    scores = [naive.softmax(x) for x in logits]
    chosen = [naive.best(s, top_k) for s in scores]
    outputs = []
    for t, x in enumerate(xs):
        total = w.get("o_bias", torch.zeros_like(x))
        for e in chosen[t]:
            weight = scores[t][e]
            if router == "normalized":
                weight = weight / sum(scores[t][other] for other in chosen[t])
            if router == "jetmoe":
                weight = naive.softmax(logits[t][chosen[t]])[chosen[t].index(e)]
            query = w["q_proj"][e] @ x
            for h, p in enumerate(part):
                mine = turn(query[p], t)
                shares = naive.softmax(torch.stack([mine @ keys[s][h] / HEAD**0.5 for s in range(t + 1)]))
                mixed = sum(shares[s] * values[s][h] for s in range(t + 1))
                total = total + weight * (w["o_proj"][e][:, p] @ mixed)
        outputs.append(total)
    balance = naive.switch([scores[t] for t in real], [chosen[t] for t in real])
    return torch.stack(outputs), torch.stack([balance, naive.z_loss([logits[t] for t in real])])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("heads,top_k,rotary", [(1, 2, True), (2, 3, True), (2, 1, False)])
def test_equals_the_formula(implementation, router, heads, top_k, rotary):
    """Output, balance losses and every gradient; the losses leave padding out."""
    mixer = build(
        implementation, router=router, top_k=top_k, heads_per_expert=heads, rotary=rotary, output_bias=heads > 1
    ).double()
    weights = naive.double(mixer)
    hidden_states, position_embeddings = inputs()
    hidden_states.requires_grad_()
    mask = torch.tensor([True] * 4 + [False] * (TIME - 4))
    output, _, losses = mixer(hidden_states, position_embeddings, context=ForwardContext(None, mask, True))
    xs = [x.detach().clone().requires_grad_() for x in hidden_states[0]]
    expected, expected_losses = reference(xs, weights, heads, top_k, router, rotary, real=[0, 1, 2, 3])
    # the router's softmax runs in fp32 by design, so that is the precision of everything behind it
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses[:2].double(), expected_losses, atol=1e-6, rtol=1e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for out, loss in ((output[0], losses), (expected, expected_losses)):
        ((out * direction).sum() + 0.7 * loss[0] + 0.3 * loss[1]).backward()
    torch.testing.assert_close(hidden_states.grad[0], torch.stack([x.grad for x in xs]), atol=1e-5, rtol=1e-5)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_implementations_agree():
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        mixer = build(implementation, heads_per_expert=2, output_bias=True)
        hidden_states, position_embeddings = inputs(2, torch.float32)
        hidden_states.requires_grad_()
        output, _, losses = mixer(hidden_states, position_embeddings, context=ForwardContext(losses=True))
        (output.square().sum() + losses.sum()).backward()
        results.append([output, losses, hidden_states.grad, *(p.grad for p in mixer.parameters())])
    for tensors in zip(*results):
        for tensor in tensors[1:]:
            torch.testing.assert_close(tensor, tensors[0], atol=2e-5, rtol=1e-4)


def native(attn_implementation: str) -> tuple[JetMoeConfig, torch.nn.Module, torch.nn.Module]:
    """JetMoE's attention, and ours with its weights."""
    config = JetMoeConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_key_value_heads=2, kv_channels=HEAD, num_local_experts=4
    )
    ours = build(router="jetmoe", heads_per_expert=2, output_bias=True)
    config._attn_implementation = ours.config._attn_implementation = attn_implementation
    theirs = JetMoeAttention(config, 0)
    with torch.no_grad():
        theirs.experts.router.layer.weight.copy_(ours.gate.weight)
        theirs.experts.input_linear.weight.copy_(ours.q_proj)
        theirs.experts.output_linear.weight.copy_(ours.o_proj)
        theirs.experts.bias.copy_(ours.o_bias)
        theirs.kv_proj.weight.copy_(torch.cat([ours.k_proj.weight, ours.v_proj.weight]))
    return config, theirs.double(), ours.double()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_equals_native_jetmoe(attn_implementation):
    """Same output, same attention weights up to the order of the heads, same gradients, same cache."""
    config, theirs, ours = native(attn_implementation)
    hidden_states, _ = inputs(2)
    tables = JetMoeRotaryEmbedding(config)(hidden_states, torch.arange(TIME)[None])
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((TIME, TIME), lowest, dtype=torch.float64).triu(1).repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = lowest  # the second row is padded on the left
    results = []
    for mixer in (theirs, ours):
        x, cache = hidden_states.clone().requires_grad_(), DynamicCache()
        output, weights, _ = mixer(
            x, position_embeddings=tables, attention_mask=mask, past_key_values=cache, position_ids=None
        )
        output[:, 2:].square().sum().backward()
        results.append((output[:, 2:], weights, x.grad, cache.layers[0].keys, cache.layers[0].values))
    for name, actual, expected in zip(("output", "weights", "gradient", "keys", "values"), results[1], results[0]):
        if name == "weights":
            if expected is not None:  # theirs: (slot, key head), ours: (key head, slot)
                expected = expected.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
                torch.testing.assert_close(actual[:, :, 2:], expected[:, :, 2:])
            continue
        torch.testing.assert_close(actual, expected)
    experts = theirs.experts
    pairs = [
        (ours.gate.weight, experts.router.layer.weight),
        (ours.q_proj, experts.input_linear.weight),
        (ours.o_proj, experts.output_linear.weight),
        (ours.o_bias, experts.bias),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad)
    both = torch.cat([ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    torch.testing.assert_close(both, theirs.kv_proj.weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("num_experts,top_k,heads", [(2, 1, 1), (8, 4, 1), (4, 2, 3)])
def test_cache_does_not_grow_with_the_experts(num_experts, top_k, heads):
    """2 H d numbers per token and layer, counted in the cache of a real forward pass."""
    config = tiny(spec(num_experts, top_k, heads_per_expert=heads))
    cache = DynamicCache(config=config)
    HfMoeForCausalLM(config)(torch.arange(1, 8)[None], past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 7 * 2 * heads * HEAD


def test_losses_join_those_of_the_feed_forwards():
    """The model's balance loss has both routers of every layer in it; its router logits are the feed-forwards'."""
    experts = {"type": "swiglu", "intermediate_size": 8}
    moe = {"type": "moe", "num_experts": 3, "router": {"type": "top_k", "top_k": 1}, "experts": experts}
    torch.manual_seed(0)
    model = HfMoeForCausalLM(tiny(spec(), moe, router_z_loss_coef=0.001)).eval()
    seen = []
    for layer in model.model.layers:
        for gate in (layer.self_attn.gate, layer.mlp.gate):
            gate.register_forward_hook(lambda gate, _, routing: seen.append(gate.losses(routing)))
    outputs = model(torch.arange(1, 8)[None], output_router_logits=True)
    assert len(seen) == 4 and [logits.shape for logits in outputs.router_logits] == [(7, 3), (7, 3)]
    balance, z, _ = torch.stack(seen).sum(0)
    torch.testing.assert_close(outputs.aux_loss, balance + 0.1 * z)


def test_lora_trains_the_stacked_projections():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = HfMoeForCausalLM(tiny(spec(heads_per_expert=2), initializer_range=0.2))
    ids = torch.arange(1, 8)[None]
    expected = copy.deepcopy(model).eval()(ids).logits
    stacked = ["self_attn.q_proj", "self_attn.o_proj"]
    config = LoraConfig(r=2, target_modules=["v_proj"], target_parameters=stacked, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 and all(p.grad is not None and p.grad.any() for p in trained.values())
    logits = adapted.eval()(ids).logits
    assert not torch.allclose(logits, expected, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_moa(norm_topk_prob, heads):
    """The architecture: x + attention(norm(x)), x + W_down relu(W_up norm(x) + b) + b; logits, losses, gradients."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": WIDTH, "head_dim": HEAD, "intermediate_size": 12}
    config = tiny_config(
        "moa", **sizes, num_key_value_heads=heads, num_attention_heads=2 * heads, norm_topk_prob=norm_topk_prob,
        attention_output_bias=heads == 2, initializer_range=0.3,
    )  # fmt: skip
    model = MoaForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    model = model.double().train()
    weights, ids = naive.double(model), torch.arange(5, 5 + TIME)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    xs, losses = [weights["model.embed_tokens.weight"][i] for i in ids], []
    for layer in range(2):
        p = f"model.layers.{layer}."
        w = {name.removeprefix(p): tensor for name, tensor in weights.items() if name.startswith(p)}
        attention = {name.removeprefix("self_attn."): tensor for name, tensor in w.items()}
        normed = [naive.rms_norm(x, w["input_layernorm.weight"]) for x in xs]
        router = "normalized" if norm_topk_prob else "released"
        mixed, loss = reference(normed, attention, heads, 2, router, True, real=list(range(TIME)))
        xs, losses = [x + y for x, y in zip(xs, mixed)], [*losses, loss]
        normed = [naive.rms_norm(x, w["post_attention_layernorm.weight"]) for x in xs]
        hidden = [(w["mlp.up_proj.weight"] @ x + w["mlp.up_proj.bias"]).clamp(min=0) for x in normed]
        xs = [x + w["mlp.down_proj.weight"] @ h + w["mlp.down_proj.bias"] for x, h in zip(xs, hidden)]
    normed = [naive.rms_norm(x, weights["model.norm.weight"]) for x in xs]
    expected = torch.stack([weights["lm_head.weight"] @ x for x in normed])
    outputs = model(ids[None], use_cache=False)
    balance, z = sum(losses)
    aux_loss = balance + z * config.router_z_loss_coef / config.router_aux_loss_coef
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.aux_loss.double(), aux_loss, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for logits, loss in ((outputs.logits[0], outputs.aux_loss), (expected, aux_loss)):
        ((logits * direction).sum() + loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("config", [MoaConfig.base(), MoaConfig()], ids=["base", "default"])
def test_moa_sizes(config):
    """E query and output experts of width d, one key head, one value head, a gate; a feed-forward with biases."""
    with torch.device("meta"):
        layer = MoaForCausalLM(config).model.layers[0]
    width, head, experts = config.hidden_size, config.head_dim, config.num_attention_experts
    attention, feed_forward = (sum(p.numel() for p in m.parameters()) for m in (layer.self_attn, layer.mlp))
    assert attention == 2 * experts * width * head + 2 * width * head + experts * width
    assert feed_forward == 2 * width * config.intermediate_size + config.intermediate_size + width
    assert config.num_attention_experts_per_tok == layer.self_attn.gate.top_k


@pytest.mark.parametrize(
    "options,message",
    [
        ({"router": {"type": "recurrent"}}, "carries its state"),
        ({"router": {"type": "top_k", "top_k": 5}}, "must be 1 to 4"),
        ({"heads_per_expert": 0}, "at least 1"),
        ({"router": "top_k"}, "to be a spec"),
    ],
    ids=["stateful", "too-many", "headless", "no-spec"],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tiny({**spec(), **options})
