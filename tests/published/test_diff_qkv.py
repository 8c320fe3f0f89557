"""DiffQKV against a float64 loop, what its cache weighs, and the selection of values."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling import layers
from hf_moe.modeling.cache import cache_memory
from hf_moe.modeling.mixers import DiffQkv
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import attentions
import naive

WIDTH, TIME = 16, 9
CASES = {  # (query, key, value heads), options
    "published": ((8, 1, 4), {"query_size": 24}),
    "plain-queries": ((8, 2, 4), {}),
    "narrow-keys": ((4, 2, 2), {"key_head_dim": 2}),
    "wide-keys": ((4, 1, 2), {"key_head_dim": 8, "query_size": 10}),
    "fewer-values": ((8, 4, 2), {}),
    "neither-divides": ((12, 3, 2), {}),
}


def build_config(heads: tuple[int, int, int], **options) -> HfMoeConfig:
    block = {
        "mixer": {"type": "diff_qkv", "num_key_heads": heads[1], **options},
        "feed_forward": {"type": "mlp", "intermediate_size": 24},
    }
    sizes = {"hidden_size": WIDTH, "num_attention_heads": heads[0], "num_key_value_heads": heads[2], "head_dim": 4}
    config = tiny_config("hf_moe", **sizes, initializer_range=0.4, blocks={"b": block})
    config._attn_implementation = "sdpa"
    return config


def build_layer(heads: tuple[int, int, int], **options) -> DiffQkv:
    torch.manual_seed(0)
    config = build_config(heads, **options)
    layer = DiffQkv(config, 0, num_key_heads=heads[1], **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def rows(seed: int = 1) -> Tensor:
    return torch.randn(2, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tables(layer: DiffQkv) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the decoder hands them over; of no use to a layer with an embedding of its own."""
    own = layers.RotaryEmbedding(layer.config)
    return own(torch.empty(1, dtype=torch.float64), torch.arange(TIME)[None])


def run(layer: DiffQkv, hidden_states: Tensor) -> Tensor:
    mask = torch.ones(TIME, TIME, dtype=torch.bool).tril()[None, None]  # what a layer of type masked_attention gets
    return layer(hidden_states, tables(layer), mask, position_ids=torch.arange(TIME)[None])[0]


def compare(layer: DiffQkv, heads: tuple[int, int, int], **options) -> None:
    """Outputs and gradients."""
    inputs, leaves, weights = rows().requires_grad_(), rows().requires_grad_(), naive.double(layer)
    output = run(layer, inputs)
    expected = torch.stack(
        [torch.stack(attentions.diff_qkv(weights, "", list(row), heads, **options)) for row in leaves]
    )
    # cosines are fp32 by design
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (output * rows(2)).sum().backward()
    (expected * rows(2)).sum().backward()
    torch.testing.assert_close(inputs.grad, leaves.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_loop(case, implementation):
    heads, options = CASES[case]
    layer = build_layer(heads, **options)
    layer.config._attn_implementation = implementation
    if implementation == "eager":  # adds its mask
        layer.register_forward_pre_hook(
            lambda module, args: (*args[:2], torch.zeros(args[2].shape).masked_fill(~args[2], -1e30))
        )
    compare(layer, heads)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("best", [1, 3, TIME, 100])
def test_selected_values(best, renormalize):
    heads = (8, 2, 4)
    layer = build_layer(heads, top_values=best, renormalize=renormalize, query_size=12).eval()
    compare(layer, heads, best=best, renormalize=renormalize)


def test_training_sums_all_values():
    heads = (8, 2, 4)
    compare(build_layer(heads, top_values=2).train(), heads)


def test_dropout_reaches_the_selected_values():
    layer = build_layer((8, 2, 4), top_values=2).train()
    layer.attention_dropout = 1.0
    assert not run(layer, rows()).any()


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_cache_holds_what_the_paper_counts(cache_class):
    """Sigma-1.5B's heads: 4 keys and 16 values of 64 against 16 and 16, 1280 numbers per token and layer, not 2048."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 64, "hidden_size": WIDTH}
    measured = []
    for mixer in ({"type": "diff_qkv", "num_key_heads": 4}, {"type": "attention"}):
        block = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 8}}
        model = HfMoeForCausalLM(tiny_config("hf_moe", **sizes, blocks={"b": block})).eval()
        options = {"max_cache_len": 8} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **options)
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        measured.append(cache_memory(cache).per_token / model.config.num_hidden_layers / 4)
    assert measured == [1280, 2048]


@torch.no_grad()
def test_selection_reads_the_cache():
    """Steps through the cache choose the same values as the plain forward pass."""
    torch.manual_seed(0)
    model = HfMoeForCausalLM(build_config((8, 2, 4), top_values=3)).eval()
    assert set(model.config.layer_types) == {"masked_attention"}
    ids = torch.randint(3, 99, (2, 12))
    expected = model(ids, use_cache=False).logits
    everything = HfMoeForCausalLM(build_config((8, 2, 4))).eval()
    everything.load_state_dict(model.state_dict())
    assert set(everything.config.layer_types) == {"full_attention"}
    torch.testing.assert_close(everything(ids).logits[:, :3], expected[:, :3])
    assert not torch.allclose(everything(ids).logits[:, 4:], expected[:, 4:], atol=1e-2)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 4, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=2e-5, rtol=2e-5)


def test_kernels_never_get_keys_narrower_than_values(monkeypatch):
    """Flash attention pads values to the width of the keys, and cuts them where they are wider."""
    widths = []

    def kernel(module, query, key, value, mask, **kwargs):
        widths.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True
        ).transpose(1, 2), None

    monkeypatch.setattr(layers.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: kernel)
    for width in (2, 4, 6):
        compare(build_layer((4, 2, 2), key_head_dim=width), (4, 2, 2))
    assert widths == [(4, 4, 4), (4, 4, 4), (6, 6, 4)]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_key_heads": 3}, r"num_key_heads=3 does not divide num_attention_heads=8; use one of \[1, 2, 4, 8\]"),
        ({"num_key_heads": 0}, "num_key_heads=0 does not divide"),
        ({"key_head_dim": 3}, "key_head_dim=3: rotary positions need an even number"),
        ({"top_values": 0}, "top_values=0 must be at least 1"),
        ({"query_size": -1}, "query_size=-1 must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_config((8, options.pop("num_key_heads", 2), 4), **options)
