"""WideNet (arXiv 2107.11817): one mixer and one feed-forward at all depths, norms of each depth's own."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache

import hf_moe
from hf_moe import HfMoeConfig, HfMoeForCausalLM, WideNetForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
import naive
import specs
import test_published as published

DEPTH = 3
KNOW_THEIR_DEPTH = {"hyper_attention"}  # draws other random numbers in every layer


def build(kind: str = "widenet", mixer: str = "attention", feed_forward: dict | None = None, **overrides):
    """A tiny model of one block over three depths."""
    block = specs.block(specs.MIXERS[mixer], feed_forward or specs.moe(), kind)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": DEPTH, "initializer_range": 0.2}
    return HfMoeForCausalLM(HfMoeConfig(**{**sizes, "blocks": {"b": block}, **overrides})).eval()


def unshared(model: HfMoeForCausalLM, mixer: str) -> HfMoeForCausalLM:
    """The same model with a copy of the halves at every depth."""
    copies = build("pre_norm", mixer)
    weights = {}
    for name, tensor in model.state_dict().items():
        prefix, found, rest = name.partition("shared.widenet.")
        names = [f"{prefix}layers.{i}.{rest}" for i in range(DEPTH)] if found else [name]
        weights |= dict.fromkeys(names, tensor)
    copies.load_state_dict(weights)
    return copies


def test_one_layer_at_every_depth():
    torch.manual_seed(0)
    config = {"num_hidden_layers": DEPTH, "attention_bias": False, "expert_activation": "relu"}
    model = WideNetForCausalLM(tiny_config("widenet", **published.SIZES, **config))
    halves = "model.shared.widenet."

    def reference(w: naive.Weights) -> tuple:
        losses = []

        def layer(p: str, xs: list[Tensor]) -> list[Tensor]:
            normed = [naive.rms_norm(x, w[f"{p}input_layernorm.weight"]) for x in xs]
            wq, wk, wv, wo = (w[f"{halves}self_attn.{n}_proj.weight"] for n in "qkvo")
            xs = [x + wo @ y for x, y in zip(xs, naive.attention(normed, wq, wk, wv, 4, 2))]
            normed = [naive.rms_norm(x, w[f"{p}post_attention_layernorm.weight"]) for x in xs]
            logits = [w[f"{halves}mlp.gate.weight"] @ x for x in normed]
            scores = [naive.softmax(x) for x in logits]
            chosen = [naive.best(s, 2) for s in scores]
            losses.append((naive.switch(scores, chosen), naive.z_loss(logits)))
            outputs = []
            for x, read, s, experts in zip(xs, normed, scores, chosen):
                total = x
                for e in experts:
                    up, up_bias, down, down_bias = (
                        w[f"{halves}mlp.ungated_experts.{name}"][e]
                        for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
                    )
                    total = total + s[e] * (down @ (up @ read + up_bias).clamp(min=0) + down_bias)
                outputs.append(total)
            return outputs

        return published.run_layers(w, DEPTH, layer), *published.summed(losses)

    published.compare(model, reference)


@pytest.mark.parametrize("mixer", sorted(specs.MIXERS.keys() - KNOW_THEIR_DEPTH))
def test_sharing_changes_nothing_but_the_number_of_weights(mixer):
    """Also of mixers with a state, and of those that compute with their depth (lightning's decay)."""
    model = build(mixer=mixer)
    copies = unshared(model, mixer)
    ids = specs.tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copies(ids).logits)
        cache, pieces = DynamicCache(config=model.config), []
        for piece in ids.split([4, 1, 5], dim=1):
            pieces.append(model(piece, past_key_values=cache).logits)
        specs.close(torch.cat(pieces, 1), copies(ids, use_cache=False).logits)
    expected: dict[str, Tensor] = {}
    copies.train()(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in copies.named_parameters():
        number = name.split(".")[2] if "model.layers." in name else ""
        if ".self_attn." in name or ".mlp." in name:
            name = name.replace(f"layers.{number}.", "shared.widenet.")
        expected[name] = expected.get(name, 0) + parameter.grad
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:  # the repetition must find the depth again
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            specs.close(parameter.grad, expected[name], 1e-4)


@pytest.mark.parametrize("mixer", sorted(KNOW_THEIR_DEPTH))
def test_mixers_that_know_their_depth_are_refused(mixer):
    with pytest.raises(ValueError, match="depend on the layer; choose others"):
        build(mixer=mixer)


def test_feed_forwards_that_know_their_depth_are_refused():
    with pytest.raises(ValueError, match=r"mlp.pool.* depend on the layer"):
        build(feed_forward={**specs.FEED_FORWARDS["pooled_moe"], "layers_per_pool": 1})


def test_what_tools_see(tmp_path):
    model = build()
    model.set_attn_implementation("eager")
    outputs = model(specs.tokens(), output_router_logits=True, output_attentions=True)
    assert len(outputs.router_logits) == len(outputs.attentions) == DEPTH
    assert not torch.equal(outputs.attentions[0], outputs.attentions[1])
    (layer,) = hf_moe.moe_layers(model)
    assert layer.name == "model.shared.widenet.mlp"
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.equal(again(specs.tokens()).logits, model(specs.tokens()).logits)


def test_compiled_once():
    """The mixer's number changes in every layer; a graph must not be traced again for it."""
    model, ids = build(), specs.tokens()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            specs.close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count == 1


def test_layers_compiled_one_by_one():
    model, ids = build(), specs.tokens()
    expected = model(ids).logits
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    specs.close(model(ids).logits, expected)


def test_lora_adapts_each_weight_once():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all("shared.widenet" in name for name in trained)


def test_two_kinds_of_halves_are_refused():
    blocks = {
        "a": specs.block(specs.ATTENTION, specs.moe(), "widenet"),
        "b": specs.block({**specs.ATTENTION, "rotary": False}, specs.moe(), "widenet"),
    }
    with pytest.raises(ValueError, match="All blocks share one 'widenet'"):
        build(blocks=blocks)


def test_sizes():
    """What all depths share by default, counted by hand (our own count, no published figure)."""
    with torch.device("meta"):
        model = WideNetForCausalLM(hf_moe.WideNetConfig())
    shared = sum(p.numel() for p in model.model.shared.parameters())
    assert shared == 4 * (768**2 + 768) + 4 * (2 * 768 * 4096 + 4096 + 768) + 4 * 768
