"""SwitchHead against a float64 loop over tokens, heads and experts."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_moe import MIXERS, HfMoeConfig, HfMoeForCausalLM, SwitchHeadConfig, SwitchHeadForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HEAD, TIME = 16, 8, 6


def spec(num_heads: int = 2, num_experts: int = 4, **options) -> dict:
    return {"type": "switch_head", "num_heads": num_heads, "num_experts": num_experts, **options}


def tiny(mixer: dict, **sizes) -> HfMoeConfig:
    block = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 24}}
    return tiny_config("hf_moe", **{"hidden_size": WIDTH, "head_dim": HEAD, "blocks": {"b": block}, **sizes})


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


def inputs(batch: int = 1, dtype: torch.dtype = torch.float64, turned: int = HEAD) -> tuple[Tensor, dict]:
    """Hidden states, their positions, and the model's cosines and sines, of the whole width of a head."""
    hidden_states = torch.randn(batch, TIME, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = torch.outer(torch.arange(TIME), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)[None]
    tables = (angles.cos().to(dtype), angles.sin().to(dtype))
    return hidden_states.to(dtype), {"position_embeddings": tables, "position_ids": torch.arange(TIME)[None]}


def reference(xs: list[Tensor], w: naive.Weights, heads: int, experts: int, top_k: int, turned: int) -> Tensor:
    """y_t = sum_h sum_e s_O,the Wo_he sum_s softmax_s(q_th k_sh / sqrt(d)) sum_e s_V,she Wv_he x_s."""

    def head(x: Tensor, name: str, h: int) -> Tensor:
        return w[f"{name}_proj.weight"][h * HEAD : (h + 1) * HEAD] @ x

    def turn(x: Tensor, position: int) -> Tensor:
        return torch.cat([naive.rotate(x[:turned], position), x[turned:]]) if turned else x

    def chosen(x: Tensor, name: str, h: int) -> list[tuple[int, Tensor]]:
        scores = naive.sigmoid(w[f"{name}_gate.weight"][h * experts : (h + 1) * experts] @ x)
        return [(h * experts + e, scores[e]) for e in naive.best(scores, top_k)]

    outputs = [torch.zeros_like(x) for x in xs]
    for h in range(heads):
        keys = [turn(head(x, "k", h), t) for t, x in enumerate(xs)]
        values = [sum(s * (w["v_proj"][e] @ x) for e, s in chosen(x, "v", h)) for x in xs]
        for t, x in enumerate(xs):
            query = turn(head(x, "q", h), t)
            shares = naive.softmax(torch.stack([query @ keys[s] / math.sqrt(HEAD) for s in range(t + 1)]))
            attended = sum(shares[s] * values[s] for s in range(t + 1))
            outputs[t] = outputs[t] + sum(s * (w["o_proj"][e] @ attended) for e, s in chosen(x, "o", h))
    return torch.stack(outputs)


ROTARY = {"half": ({}, HEAD // 2), "whole": ({"partial_rotary_factor": 1.0}, HEAD), "none": ({"rotary": False}, 0)}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("heads,experts,top_k", [(2, 4, 2), (1, 3, 1), (3, 2, 2)])
def test_equals_the_formula(implementation, rotary, heads, experts, top_k):
    """Output and every gradient."""
    options, turned = ROTARY[rotary]
    mixer = build(implementation, num_heads=heads, num_experts=experts, top_k=top_k, **options).double()
    weights = naive.double(mixer)
    hidden_states, others = inputs()
    hidden_states.requires_grad_()
    output, _, losses = mixer(hidden_states, **others)
    xs = [x.detach().clone().requires_grad_() for x in hidden_states[0]]
    expected = reference(xs, weights, heads, experts, top_k, turned)
    assert losses is None
    # sigmoids and angles are computed in fp32 by design, so that is the precision of everything behind them
    torch.testing.assert_close(output[0], expected, atol=2e-6, rtol=2e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for out in (output[0], expected):
        (out * direction).sum().backward()
    torch.testing.assert_close(hidden_states.grad[0], torch.stack([x.grad for x in xs]), atol=1e-5, rtol=1e-5)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_implementations_agree():
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        mixer = build(implementation)
        hidden_states, others = inputs(2, torch.float32)
        hidden_states.requires_grad_()
        output, _, _ = mixer(hidden_states, **others)
        output.square().sum().backward()
        results.append([output, hidden_states.grad, *(p.grad for p in mixer.parameters())])
    for tensors in zip(*results):
        for tensor in tensors[1:]:
            torch.testing.assert_close(tensor, tensors[0], atol=2e-5, rtol=1e-4)


def test_one_expert_with_open_gates_is_attention():
    """One expert per head whose sigmoids are 1/2: a quarter of plain attention with the same matrices."""
    mixer = build(num_heads=2, num_experts=1, top_k=1).double()
    hidden_states, others = inputs()
    with torch.no_grad():
        mixer.v_gate.weight.zero_()
        mixer.o_gate.weight.zero_()
        output, _, _ = mixer(hidden_states, **others)
        config = tiny(
            {"type": "attention", "partial_rotary_factor": 0.5}, num_attention_heads=2, num_key_value_heads=2
        )
        config._attn_implementation = "sdpa"
        plain = MIXERS["attention"](config, 0, partial_rotary_factor=0.5).double()
        plain.q_proj.weight.copy_(mixer.q_proj.weight)
        plain.k_proj.weight.copy_(mixer.k_proj.weight)
        plain.v_proj.weight.copy_(mixer.v_proj.flatten(0, 1))
        plain.o_proj.weight.copy_(mixer.o_proj.transpose(0, 1).flatten(1))
        expected, _, _ = plain(hidden_states, **others)
    torch.testing.assert_close(4 * output, expected)


@torch.no_grad()
@pytest.mark.parametrize("num_heads,num_experts,top_k", [(2, 4, 2), (3, 8, 4), (1, 1, 1)])
def test_cache_does_not_grow_with_the_experts(num_heads, num_experts, top_k):
    """2 H d numbers per token and layer, counted in the cache of a real forward pass."""
    config = tiny(spec(num_heads, num_experts, top_k=top_k))
    cache = DynamicCache(config=config)
    HfMoeForCausalLM(config)(torch.arange(1, 8)[None], past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 7 * 2 * num_heads * HEAD


def test_expert_dropout_only_in_training():
    """Each expert is hidden with this probability: the best of 4 is chosen less often, and the others instead."""
    gate = build(num_heads=1, top_k=1, expert_dropout=0.5).v_gate
    tokens = torch.randn(1, WIDTH).repeat(4000, 1)
    gate.eval()
    best = gate(tokens)[0].unique().item()
    gate.train()
    torch.manual_seed(0)
    indices, weights = gate(tokens)
    # hidden alone 1/2, and of the 1/16 where all four are, an arbitrary one is taken
    assert abs((indices == best).float().mean() - 0.5) < 0.07
    assert indices.unique().tolist() == [0, 1, 2, 3]
    logits = tokens[0] @ gate.weight.T
    torch.testing.assert_close(weights.flatten(), logits.sigmoid()[indices.flatten()])


def test_initial_weights():
    """Std init_scale / sqrt(inputs), or the config's; router rows of one norm either way."""
    for scale in (None, 0.5):
        torch.manual_seed(0)
        config = tiny(spec(4, init_scale=scale), hidden_size=256, head_dim=32, initializer_range=0.1)
        layer = HfMoeForCausalLM(config).model.layers[0].self_attn
        inward, outward = (0.1, 0.1) if scale is None else (0.5 / math.sqrt(256), 0.5 / math.sqrt(4 * 32))
        for weight, std in (
            (layer.q_proj.weight, inward),
            (layer.k_proj.weight, inward),
            (layer.v_proj, inward),
            (layer.o_proj, outward),
            (layer.v_gate.weight, inward),
            (layer.o_gate.weight, inward),
        ):
            assert abs(weight.std() / std - 1) < 0.05
        for gate in (layer.v_gate, layer.o_gate):
            norms = gate.weight.norm(dim=-1)
            torch.testing.assert_close(norms, torch.full_like(norms, inward * math.sqrt(256)))


def test_lora_trains_the_stacked_projections():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = HfMoeForCausalLM(tiny(spec(), initializer_range=0.2))
    ids = torch.arange(1, 8)[None]
    expected = model.eval()(ids).logits.detach()
    stacked = ["self_attn.v_proj", "self_attn.o_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacked, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 and all(p.grad is not None and p.grad.any() for p in trained.values())
    logits = adapted.eval()(ids).logits
    assert not torch.allclose(logits, expected, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_switchhead():
    """The architecture: x + attention(norm(x)), x + W_down relu(W_up norm(x) + b) + b; logits and gradients."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": WIDTH, "head_dim": HEAD, "intermediate_size": 12}
    config = tiny_config("switchhead", **sizes, num_attention_heads=2, num_attention_experts=3, initializer_range=0.3)
    model = SwitchHeadForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    for name, parameter in model.named_parameters():
        if "bias" in name or "self_attn" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    model = model.double()
    weights, ids = naive.double(model), torch.arange(5, 5 + TIME)
    xs = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(2):
        p = f"model.layers.{layer}."
        w = {name.removeprefix(p): tensor for name, tensor in weights.items() if name.startswith(p)}
        attention = {name.removeprefix("self_attn."): tensor for name, tensor in w.items()}
        normed = [naive.rms_norm(x, w["input_layernorm.weight"]) for x in xs]
        mixed = reference(normed, attention, heads=2, experts=3, top_k=2, turned=HEAD // 2)
        xs = [x + y for x, y in zip(xs, mixed)]
        normed = [naive.rms_norm(x, w["post_attention_layernorm.weight"]) for x in xs]
        hidden = [(w["mlp.up_proj.weight"] @ x + w["mlp.up_proj.bias"]).clamp(min=0) for x in normed]
        xs = [x + w["mlp.down_proj.weight"] @ h + w["mlp.down_proj.bias"] for x, h in zip(xs, hidden)]
    normed = [naive.rms_norm(x, weights["model.norm.weight"]) for x in xs]
    expected = torch.stack([weights["lm_head.weight"] @ x for x in normed])
    outputs = model(ids[None], use_cache=False)
    assert outputs.aux_loss is None
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for logits in (outputs.logits[0], expected):
        (logits * direction).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "config,relative_positions,published",
    [(SwitchHeadConfig(), False, 243), (SwitchHeadConfig.c4_262m(), True, 262), (SwitchHeadConfig.c4_47m(), True, 47)],
    ids=["wikitext-243m", "c4-262m", "c4-47m"],
)
def test_switchhead_sizes(config, relative_positions, published):
    """The paper's millions: ours, and what the released models have besides."""
    with torch.device("meta"):
        total = sum(p.numel() for p in SwitchHeadForCausalLM(config).parameters())
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    total += (2 * layers + 1) * width + config.vocab_size  # biases of the norms and of the head
    total += layers * width * heads * relative_positions  # projections of Transformer-XL's positions
    assert round(total / 1e6) == published


def test_switchhead_starts_as_released():
    """Attention weights of std 1 / sqrt(layers * inputs), the rest of `initializer_range`."""
    torch.manual_seed(0)
    model = SwitchHeadForCausalLM(SwitchHeadConfig(num_hidden_layers=2, vocab_size=100))
    layer = model.model.layers[0]
    for weight, std in (
        (layer.self_attn.q_proj.weight, (2 * 1024) ** -0.5),
        (layer.self_attn.v_proj, (2 * 1024) ** -0.5),
        (layer.self_attn.o_proj, (2 * 4 * 100) ** -0.5),
        (layer.mlp.up_proj.weight, 0.02),
    ):
        assert abs(weight.std() / std - 1) < 0.02


def test_switchhead_has_keys_for_every_head():
    with pytest.raises(ValueError, match="Leave it out"):
        SwitchHeadConfig(num_key_value_heads=2)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 5}, "must be 1 to num_experts=4"),
        ({"num_heads": 0}, "at least 1"),
        ({"expert_dropout": 1.0}, r"in \[0, 1\)"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
    ],
    ids=["too-many", "headless", "all-dropped", "nothing-rotated"],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tiny({**spec(), **options})
