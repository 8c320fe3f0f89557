"""Sigma against a float64 loop of the whole model, and its published sizes."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_moe import SigmaConfig, SigmaForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import attentions
import naive

IDS = torch.randint(3, 97, (6,), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 97, "hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 4, "num_key_heads": 2,
    "head_dim": 4, "initializer_range": 0.3,
}  # fmt: skip


def logits_of(w: naive.Weights, **options) -> torch.Tensor:
    """Pre-norm blocks of DiffQKV and SwiGLU; tied embeddings."""
    xs = [w["model.embed_tokens.weight"][i] for i in IDS]
    for layer in range(2):
        p = f"model.layers.{layer}."
        normed = [naive.rms_norm(x, w[p + "input_layernorm.weight"]) for x in xs]
        mixed = attentions.diff_qkv(w, p + "self_attn.", normed, (8, 2, 4), theta=50000.0, **options)
        xs = [x + y for x, y in zip(xs, mixed)]
        normed = [naive.rms_norm(x, w[p + "post_attention_layernorm.weight"]) for x in xs]
        mlp = [w[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        xs = [x + naive.swiglu(y, *mlp) for x, y in zip(xs, normed)]
    return torch.stack([w["lm_head.weight"] @ naive.rms_norm(x, w["model.norm.weight"]) for x in xs])


@pytest.mark.parametrize("options", [{}, {"query_size": None}, {"key_head_dim": 2}], ids=str)
def test_loop(options):
    torch.manual_seed(0)
    model = SigmaForCausalLM(tiny_config("sigma", **{**SIZES, **options})).double().train()
    weights = naive.double(model)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    logits = model(IDS[None], use_cache=False).logits[0]
    expected = logits_of(weights)
    # norms and cosines run in fp32 by design
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        expected_grad = weights[name].grad
        torch.testing.assert_close(parameter.grad, expected_grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [True, False])
def test_selective_values_at_inference(renormalize):
    torch.manual_seed(0)
    options = {"top_values": 2, "renormalize_values": renormalize}
    model = SigmaForCausalLM(tiny_config("sigma", **SIZES, **options)).double()
    weights = naive.double(model)
    training = model.train()(IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(training, logits_of(weights), atol=1e-5, rtol=1e-5)
    expected = logits_of(weights, best=2, renormalize=renormalize)
    torch.testing.assert_close(model.eval()(IDS[None]).logits[0], expected, atol=1e-5, rtol=1e-5)


def count(config: SigmaConfig) -> int:
    with torch.device("meta"):
        model = SigmaForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config,width,layers,intermediate,query_size,total",
    [
        (SigmaConfig(), 2048, 26, 6144, 3072, 2_021_238_784),
        (SigmaConfig(query_size=None), 2048, 26, 6144, 0, 1_530_505_216),
        (SigmaConfig.sigma_10b(), 4096, 32, 14336, 6144, 9_987_952_640),
    ],
    ids=["1.5b", "1.5b-plain-queries", "10b"],
)
def test_published_sizes(config, width, layers, intermediate, query_size, total):
    """Appendix of arXiv 2501.13629: 32 query, 4 key and 16 value heads, Llama 3's vocabulary; embeddings tied."""
    attention = width * width * 2 + width * width // 32 * (4 + 16) + 3 * width * query_size
    layer = attention + 3 * width * intermediate + 2 * width
    assert count(config) == layers * layer + 128256 * width + width == total


def test_published_layouts():
    small, large = SigmaConfig(), SigmaConfig.sigma_10b(max_position_embeddings=8192)
    assert (small.head_dim, large.head_dim) == (64, 128)
    assert (small.rope_parameters["rope_theta"], large.rope_parameters["rope_theta"]) == (50000.0, 500000.0)
    assert SigmaConfig(rope_theta=7.0).rope_parameters["rope_theta"] == 7.0
    assert large.max_position_embeddings == 8192
    assert "sigma" not in CONFIG_MAPPING_NAMES
