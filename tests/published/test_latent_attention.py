"""Latent attention against a float64 loop, against four native modules, and absorbed against expanded."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BailingHybridConfig,
    DeepseekV3Config,
    DynamicCache,
    KimiLinearConfig,
    LongcatFlashConfig,
    StaticCache,
)
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridAttention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMLA

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.cache import cache_memory
from hf_moe.modeling.mixers import LatentAttention
from hf_moe.modeling.ops.matrix import is_plain, matrix_of
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import attentions
import naive

WIDTH, HEADS, TIME = 24, 4, 7
SIZES = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 1.3,
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "q_lora": {"q_lora_rank": 10},
    "halves": {"rope_interleave": False},
    "nope": {"rotary": False},
    "longcat": {"q_lora_rank": 10, "scale_lora": True},
    "gate": {"output_gate": True},
}


def build_config(rope: dict | None = None, **options) -> HfMoeConfig:
    mixer = {"type": "latent_attention", **SIZES, **options}
    block = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 32}}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "rope_parameters": rope, "initializer_range": 0.4}
    config = tiny_config("hf_moe", **sizes, blocks={"b": block})
    config._attn_implementation = "sdpa"
    return config


def build_layer(dtype: torch.dtype = torch.float64, rope: dict | None = None, **options) -> LatentAttention:
    """The mixer alone, in eval mode, with weights large enough for every one of them to matter."""
    torch.manual_seed(0)
    mixer = LatentAttention(build_config(rope), 0, **SIZES, **options).to(dtype).eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer


def rows(batch: int = 2, time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(start: int, stop: int) -> dict[str, Tensor]:
    return {"position_ids": torch.arange(start, stop)[None]}


def force(monkeypatch, absorbed: bool) -> None:
    """Take the choice away from the rule."""
    monkeypatch.setattr(LatentAttention, "absorbs", lambda self, *inputs: absorbed)


NOTHING = (torch.empty(0), torch.empty(0))  # the model's own cosines: of another width, must not be used


def reference(w: naive.Weights, xs: list[Tensor], rotary=True, rope_interleave=True, scale_lora=False, **_) -> Tensor:
    turn = attentions.rotate_pairs if rope_interleave else naive.rotate
    scales = ((WIDTH / 10) ** 0.5, (WIDTH / SIZES["kv_lora_rank"]) ** 0.5) if scale_lora else (1.0, 1.0)
    widths = (SIZES["qk_nope_head_dim"], SIZES["qk_rope_head_dim"], SIZES["v_head_dim"])
    turn = turn if rotary else lambda x, position: x
    return torch.stack(attentions.latent_attention(w, "", xs, HEADS, widths, turn, scales))


@pytest.mark.parametrize("name", OPTIONS)
def test_loop(name):
    layer, hidden_states = build_layer(**OPTIONS[name]), rows()
    weights = naive.double(layer)
    inputs = hidden_states.clone().requires_grad_()
    output, _, _ = layer(inputs, NOTHING, **positions(0, TIME))
    leaves = hidden_states.clone().requires_grad_()
    expected = torch.stack([reference(weights, list(row), **OPTIONS[name]) for row in leaves])
    # norms and cosines are fp32 by design: everything behind them has that precision
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    direction = rows(seed=2)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(inputs.grad, leaves.grad, atol=1e-4, rtol=1e-4)
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, atol=1e-4, rtol=1e-4, msg=lambda m, k=key: k + m)


COMMON = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": 2,
    "max_position_embeddings": 256, "attn_implementation": "sdpa",
}  # fmt: skip
DEEPSEEK = {**COMMON, **SIZES, "q_lora_rank": None}
LONGCAT = {**COMMON, **SIZES, "q_lora_rank": 10, "num_layers": 2, "head_dim": SIZES["qk_rope_head_dim"]}
NATIVE = {  # our options, native module and config
    "deepseek_v3": ({}, DeepseekV3Attention, DeepseekV3Config(**DEEPSEEK)),
    "deepseek_v3-q_lora": (
        {"q_lora_rank": 10},
        DeepseekV3Attention,
        DeepseekV3Config(**{**DEEPSEEK, "q_lora_rank": 10}),
    ),
    "deepseek_v3-halves": (
        {"rope_interleave": False},
        DeepseekV3Attention,
        DeepseekV3Config(**DEEPSEEK, rope_interleave=False),
    ),
    "deepseek_v3-yarn": ({}, DeepseekV3Attention, DeepseekV3Config(**DEEPSEEK, rope_parameters=YARN)),
    "longcat_flash": ({"q_lora_rank": 10, "scale_lora": True}, LongcatFlashMLA, LongcatFlashConfig(**LONGCAT)),
    "kimi_linear": ({"rotary": False}, KimiLinearAttention, KimiLinearConfig(**DEEPSEEK)),
    "bailing_hybrid": ({"output_gate": True}, BailingHybridAttention, BailingHybridConfig(**COMMON, **SIZES)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_native(name):
    """Same weights under the same names, same output; in one pass, and decoded from the same compressed cache."""
    options, native_class, config = NATIVE[name]
    ours = build_layer(torch.float32, getattr(config, "rope_parameters", None), **options)
    native = native_class(config, 0).eval()
    native.load_state_dict(ours.state_dict(), strict=True)
    hidden_states, tables = rows(time=TIME + 1).float(), ()
    if ours.rotary:
        tables = DeepseekV3RotaryEmbedding(config)(hidden_states, torch.arange(TIME + 1)[None])
    caches, close = (DynamicCache(), DynamicCache()), torch.testing.assert_close
    for part, ids in ((slice(0, TIME), positions(0, TIME)), (slice(TIME, None), positions(TIME, TIME + 1))):
        inputs, embeddings = hidden_states[:, part], tuple(table[:, part] for table in tables)
        args = (embeddings, None, caches[0]) if tables else (None, caches[0])
        expected = native(inputs, *args)[0]
        output = ours(inputs, NOTHING, None, caches[1], **ids)[0]
        close(output, expected, atol=1e-5, rtol=1e-5)
    close(caches[1].layers[0].keys, caches[0].layers[0].keys, atol=1e-5, rtol=1e-5)
    close(caches[1].layers[0].values, caches[0].layers[0].values, atol=1e-5, rtol=1e-5)


def decode(layer: LatentAttention, hidden_states: Tensor, new: int, mask: Tensor | None) -> tuple:
    """What the layer returns for the last `new` tokens after all others."""
    cache, old = DynamicCache(), hidden_states.shape[1] - new
    layer(hidden_states[:, :old], NOTHING, None, cache, **positions(0, old))
    return layer(hidden_states[:, old:], NOTHING, mask, cache, **positions(old, old + new))


def causal_mask(new: int, padding: int, implementation: str, dtype: torch.dtype) -> Tensor:
    """(2, 1, new, TIME), the second row padded on the left, in the form that a kernel wants."""
    mask = torch.ones(new, TIME, dtype=torch.bool).tril(TIME - new).repeat(2, 1, 1, 1)
    mask[1, ..., :padding] = False
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_absorbed_equals_expanded(monkeypatch, implementation, name, dtype, tolerance):
    """One token, several tokens, and several with left padding."""
    layer, hidden_states = build_layer(dtype, **OPTIONS[name]), rows().to(dtype)
    layer.config._attn_implementation = implementation
    for new, padding in ((1, None), (3, 0), (3, 2)):
        mask = None if padding is None else causal_mask(new, padding, implementation, dtype)
        results = []
        for absorbed in (True, False):
            # the first tokens have no mask and are left to the kernel: never absorbed
            monkeypatch.setattr(
                LatentAttention, "absorbs", lambda self, nope, *_, a=absorbed, n=new: a and nope.shape[2] == n
            )
            results.append(decode(layer, hidden_states, new, mask))
        torch.testing.assert_close(results[0][0], results[1][0], atol=tolerance, rtol=tolerance)
        if implementation == "eager":
            assert results[0][1].shape == (2, HEADS, new, TIME)
            torch.testing.assert_close(results[0][1], results[1][1], atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_choice_follows_the_multiplications():
    """Counted by torch on the two ways themselves, for lengths on both sides of the rule."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = build_layer(torch.float32)
    for new, keys in ((1, 2), (1, 40), (4, 12), (8, 16), (10, 12), (30, 64)):
        nope, rope = torch.randn(1, HEADS, new, 6), torch.randn(1, HEADS, new, 4)
        latent, key_rope, mask = (
            torch.randn(1, 1, keys, 12),
            torch.randn(1, 1, keys, 4),
            torch.ones(1, 1, new, keys, dtype=torch.bool),
        )
        layer.config._attn_implementation = "eager"  # whose products are all counted
        counts = []
        for way in (layer.attend_to_latents, layer.attend_to_heads):
            with FlopCounterMode(display=False) as counter:
                way(nope, rope, latent, key_rope, mask.float())
            counts.append(counter.get_total_flops())
        assert layer.absorbs(nope, latent, mask) == (counts[0] < counts[1]), (new, keys, counts)


@torch.no_grad()
def test_choice_respects_what_a_kernel_can_do():
    layer, mask = build_layer(torch.float32), torch.ones(1, 1, 2, 50, dtype=torch.bool)
    nope, latent = torch.randn(1, HEADS, 2, 6), torch.randn(1, 1, 50, 12)
    assert layer.absorbs(nope, latent, mask)
    assert layer.absorbs(nope[:, :, :1], latent, None)  # a single token sees everything
    assert not layer.absorbs(nope, latent, None)
    assert not layer.train().absorbs(nope, latent, mask)
    layer.eval()
    for implementation in ("flash_attention_2", "flex_attention"):
        layer.config._attn_implementation = implementation
        assert not layer.absorbs(nope, latent, mask)


@pytest.fixture
def ways(monkeypatch):
    """Models absorb whenever a mask permits it, and this list grows."""
    taken, absorb = [], LatentAttention.attend_to_latents
    permitted = lambda self, nope, latent, mask: nope.shape[2] == 1 or mask is not None  # noqa: E731
    monkeypatch.setattr(LatentAttention, "absorbs", permitted)
    monkeypatch.setattr(
        LatentAttention,
        "attend_to_latents",
        lambda self, *args, **kwargs: (taken.append(1), absorb(self, *args, **kwargs))[1],
    )
    return taken


def build_model(**options) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    return HfMoeForCausalLM(build_config(**options)).eval()


IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(5))
PADDING = torch.ones_like(IDS)
PADDING[1, :4] = 0


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_decodes_absorbed(ways, implementation):
    """Steps, continuations and left padding in dynamic and static caches give the logits of the plain forward pass."""
    model = build_model(q_lora_rank=10)
    model.set_attn_implementation(implementation)
    position_ids = (PADDING.cumsum(1) - 1).clamp(min=0)
    expected = model(IDS, attention_mask=PADDING, position_ids=position_ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        ways.clear()
        seen, outputs = 0, []
        for size in (4, 3, 1, 1):
            part = slice(seen, seen + size)
            seen += size
            inputs = {"attention_mask": PADDING[:, :seen], "position_ids": position_ids[:, part]}
            outputs.append(model(IDS[:, part], past_key_values=cache, **inputs).logits)
        logits = torch.cat(outputs, 1)
        torch.testing.assert_close(logits[0], expected[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(logits[1, 4:], expected[1, 4:], atol=2e-5, rtol=2e-5)
        assert len(ways) >= 3 * model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=lambda how: "-".join(how) or "greedy",
)
def test_generate_absorbed(ways, how):
    model, rows_ = build_model(), 1 if "prompt_lookup_num_tokens" in how else 2
    inputs = {"attention_mask": PADDING[:rows_], "max_new_tokens": 6, "do_sample": False}
    beams = {"num_beams": how.get("num_beams", 1)}
    expected = model.generate(IDS[:rows_], **inputs, **beams, use_cache=False)
    ways.clear()
    assert torch.equal(model.generate(IDS[:rows_], **inputs, **how), expected)
    assert ways


@torch.no_grad()
def test_absorbed_step_compiles_in_one_graph(ways):
    model = build_model()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(IDS, past_key_values=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    token = torch.tensor([[5], [6]])
    actual, expected = (run(token, past_key_values=cache).logits for run, cache in zip((compiled, model), caches))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_cache_holds_the_latents():
    """512 + 64 numbers per token and layer in DeepSeek's sizes, an eighth of which here."""
    model = build_model(kv_lora_rank=64, qk_rope_head_dim=8)
    cache = model(IDS).past_key_values
    assert cache_memory(cache).per_token == model.config.num_hidden_layers * (512 + 64) / 8 * 4


@torch.no_grad()
def test_offloaded_weights(ways, tmp_path):
    """`kv_b_proj` is on disk while its matrix is absorbed: reading `weight` would give nothing."""
    model = build_model()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.layers.1": "disk", "model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    assert split.model.layers[1].self_attn.kv_b_proj.weight.is_meta
    torch.testing.assert_close(split(IDS).logits, model(IDS).logits)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for piece in IDS.split([6, 2, 1], 1):
        actual, expected = (run(piece, past_key_values=cache).logits for run, cache in zip((split, model), caches))
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert len(ways) == 8  # two models, two layers, two pieces


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_absorbed_on_a_gpu(ways, dtype):
    """With the offloaded cache, which needs a CUDA device, as without."""
    model = build_model().to("cuda", dtype)
    inputs = {"inputs": IDS.cuda(), "attention_mask": PADDING.cuda(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs)
    assert ways
    assert torch.equal(model.generate(**inputs, cache_implementation="offloaded"), expected)
    if dtype == torch.float32:
        assert torch.equal(model.generate(**inputs, use_cache=False), expected)


ADAPTERS = {"lora": {}, "bias": {"lora_bias": True}, "dora": {"use_dora": True}}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_absorbed(ways, adapter):
    from peft import LoraConfig, get_peft_model

    model = build_model()
    before = model(IDS, use_cache=False).logits
    config = LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False, **ADAPTERS[adapter])
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter)
    expected = adapted(IDS, use_cache=False).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    cache = DynamicCache(config=model.config)
    logits = torch.cat([adapted(piece, past_key_values=cache).logits for piece in IDS.split([6, 2, 1], 1)], 1)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert len(ways) == 4


def test_matrix_of_anything_linear():
    """A layer whose weight is not what it does is asked, one that is plain is read."""
    plain, like = torch.nn.Linear(5, 3, bias=False), torch.randn(2, 5)
    assert is_plain(plain, like.device) and matrix_of(plain, 5, like)[0] is plain.weight
    biased = torch.nn.Linear(5, 3)
    hooked = torch.nn.Linear(5, 3, bias=False)
    hooked.register_forward_hook(lambda module, args, output: 2 * output + 1)
    for layer in (biased, hooked, torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 3, bias=False))):
        assert not is_plain(layer, like.device)
        matrix, offset = matrix_of(layer, 5, like)
        torch.testing.assert_close(like @ matrix.T + offset, layer(like))


@torch.no_grad()
def test_own_rotary_embedding(tmp_path):
    """Positions do not depend on the width of the heads of other mixers, and survive a reload."""
    model = build_model()
    assert model.config.head_dim != SIZES["qk_rope_head_dim"]
    config = build_config()
    config.head_dim = SIZES["qk_rope_head_dim"]
    narrow = HfMoeForCausalLM(config).eval()
    assert narrow.model.layers[0].self_attn.rotary_emb is None
    narrow.load_state_dict(model.state_dict())
    torch.testing.assert_close(narrow(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 is odd"),
        ({"kv_lora_rank": 0}, "at least 1: {'kv_lora_rank': 0}"),
        ({"scale_lora": True}, "set q_lora_rank"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_config(**options)
