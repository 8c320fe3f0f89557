"""HyperAttention against a float64 loop over queries, against exact attention, and in every place it must refuse."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.ops.hyper_attention import (
    HyperOptions,
    draw_indices,
    draw_normals,
    hash_buckets,
    hyper_attention,
    num_levels,
    square_attention,
)
from hf_moe.testing import tiny_config

TINY = {"type": "hyper_attention", "block_size": 2, "sample_size": 3, "min_seq_len": 4, "num_projections": 3}
SCALE = 0.7


def options(**changes) -> HyperOptions:
    sizes = {"block_size": 3, "sample_size": 4, "num_projections": 4, "min_seq_len": 4, "seed": 0, "layer_idx": 0}
    return HyperOptions(**{**sizes, **changes})


def draw(length: int, heads: int = 2, batch: int = 1, size: int = 8, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(batch, heads, length, size, generator=generator, dtype=dtype) for _ in range(3))


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT * SCALE
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def gray_codes(bits: int) -> list[int]:
    """Numbers in an order in which neighbours differ in one bit, by reflection."""
    if bits == 0:
        return [0]
    before = gray_codes(bits - 1)
    return before + [code + 2 ** (bits - 1) for code in reversed(before)]


def bucket(vector: Tensor, projections: Tensor) -> int:
    number = sum(2**i for i, direction in enumerate(projections.t()) if vector @ direction > 0)
    return gray_codes(projections.shape[1]).index(number)


def reference(query: Tensor, key: Tensor, value: Tensor, o: HyperOptions) -> Tensor:
    """One query at a time: numerator and denominator of the softmax, summed over the squares that hold its past."""
    _, heads, length, size = query.shape
    projections = draw_normals(size, o, "cpu").double()
    leaf = math.ceil(length / 2 ** num_levels(length, o))
    outputs = torch.zeros_like(query[0])

    def weight(h: int, t: int, j: int) -> Tensor:
        return torch.exp(SCALE * (query[0, h, t] @ key[0, h, j]))

    for h in range(heads):
        top = [torch.zeros(size, dtype=torch.float64) for _ in range(length)]
        bottom = [torch.zeros((), dtype=torch.float64) for _ in range(length)]

        def add(t, j, times=1.0, h=h, top=top, bottom=bottom):
            w = times * weight(h, t, j)
            top[t], bottom[t] = top[t] + w * value[0, h, j], bottom[t] + w

        for t in range(length):
            for j in range(t // leaf * leaf, t + 1):
                add(t, j)
        for level in range(num_levels(length, o)):
            side = leaf * 2 ** (num_levels(length, o) - 1 - level)
            picks = draw_indices(heads, 2**level, side, level, o, "cpu")[h]
            for node in range(2**level):
                start = 2 * side * node
                keys = list(range(start, start + side))
                queries = [t for t in range(start + side, start + 2 * side) if t < length]
                if not queries:
                    continue
                if side < o.min_seq_len or side <= max(o.block_size, o.sample_size):
                    for t in queries:
                        for j in keys:
                            add(t, j)
                    continue
                keys.sort(key=lambda j, h=h: bucket(key[0, h, j], projections))
                queries.sort(key=lambda t, h=h: bucket(query[0, h, t], projections))
                for place, t in enumerate(queries):
                    own = place // o.block_size
                    for j in keys[own * o.block_size : (own + 1) * o.block_size]:
                        add(t, j)
                    for pick in picks[node].tolist():
                        if pick // o.block_size != own:
                            add(t, keys[pick], side / o.sample_size)
        outputs = torch.stack([*outputs[:h], torch.stack([a / b for a, b in zip(top, bottom)]), *outputs[h + 1 :]])
    return outputs


@pytest.mark.parametrize("length", [1, 4, 7, 8, 16, 21, 37])  # 7 .. 37: odd halves, blocks that do not divide
def test_equals_the_loop_forward_and_backward(length):
    inputs, o = [x.requires_grad_() for x in draw(length)], options()
    ours, expected = hyper_attention(*inputs, SCALE, o)[0], reference(*inputs, o)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    for gradient, naive in zip(gradients, torch.autograd.grad((expected * direction).sum(), inputs)):
        torch.testing.assert_close(gradient, naive, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("number", range(1, 6))
def test_neighbouring_buckets_differ_in_one_sign(number):
    """The released code's permutation does so for one and two projections only."""
    o = options(num_projections=number)
    vectors = torch.randn(1, 1, 2000, 16, generator=torch.Generator().manual_seed(0))
    signs = (vectors @ draw_normals(16, o, "cpu") > 0)[0, 0]
    buckets = hash_buckets(vectors, 2000, o)[0, 0]
    patterns = {int(b): tuple(s.tolist()) for b, s in zip(buckets, signs)}
    assert sorted(patterns) == list(range(2**number)) and len(set(patterns.values())) == 2**number
    for b in range(2**number - 1):
        assert sum(x != y for x, y in zip(patterns[b], patterns[b + 1])) == 1


def test_the_draws_look_random():
    """Bits of a counter: uniform, normal, and different for every seed, layer and level."""
    o = options(sample_size=20000)
    indices = draw_indices(1, 1, 100, 0, o, "cpu").flatten()
    counts = indices.bincount(minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 150  # chi-squared with 99 degrees of freedom: one in a thousand
    normals = draw_normals(20000, options(num_projections=1), "cpu")
    assert abs(normals.mean()) < 0.03 and abs(normals.std() - 1) < 0.03 and abs(normals.pow(4).mean() - 3) < 0.3
    others = [(options(sample_size=20000, seed=1), 0), (options(sample_size=20000, layer_idx=1), 0), (o, 1)]
    for other, level in others:
        assert (draw_indices(1, 1, 100, level, other, "cpu").flatten() == indices).float().mean() < 0.02


def test_the_estimate_of_the_denominator_is_unbiased():
    """The mean over seeds of exp(lse) is the sum over all keys, blocks and draws together."""
    query, key, value = (x[:, :, None] for x in draw(24, heads=1))
    scale, totals = 0.3, []
    for seed in range(400):
        o = options(seed=seed)
        buckets = [hash_buckets(x[:, :, 0], 24, o)[:, :, None] for x in (query, key)]
        totals.append(square_attention(query, key, value, *buckets, scale, o, 0)[1].exp().flatten())
    sums = (query @ key.mT * scale).exp().sum(-1).flatten()
    totals = torch.stack(totals)
    standard_error = totals.std(0) / len(totals) ** 0.5
    assert ((totals.mean(0) - sums).abs() < 4 * standard_error).all()


def mean_error(o: HyperOptions, inputs: tuple[Tensor, ...]) -> float:
    target = exact(*inputs)
    seeds = [hyper_attention(*inputs, SCALE, o._replace(seed=seed)) for seed in range(3)]
    return sum((x - target).norm() / target.norm() for x in seeds).item() / len(seeds)


def test_the_error_falls_with_more_blocks_and_samples():
    inputs = draw(512, dtype=torch.float32)
    inputs = (inputs[0], inputs[0] + 0.5 * inputs[1], inputs[2])  # similar queries and keys exist, as LSH assumes
    errors = {
        (b, m): mean_error(options(block_size=b, sample_size=m, min_seq_len=32), inputs)
        for b, m in [(1, 16), (16, 16), (64, 16), (16, 64), (64, 64), (16, 250), (250, 250), (16, 256), (256, 1)]
    }
    assert errors[1, 16] > errors[16, 16] > errors[64, 16] > errors[64, 64] > errors[250, 250] > 1e-3
    assert errors[16, 16] > errors[16, 64] > errors[16, 250] > 1e-3
    # one block, or the samples, may hold all of the largest square: then nothing is estimated
    assert errors[16, 256] < 1e-6 and errors[256, 1] < 1e-6


@pytest.mark.parametrize("length", [5, 30, 31, 62])
def test_short_sequences_are_exact(length):
    inputs = draw(length)
    torch.testing.assert_close(hyper_attention(*inputs, SCALE, options(min_seq_len=32)), exact(*inputs))


def test_cost_grows_as_n_log_n():
    def flops(length: int, o: HyperOptions) -> int:
        inputs = draw(length, heads=1, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hyper_attention(*inputs, SCALE, o)
        return counter.get_total_flops()

    o, lengths = options(block_size=16, sample_size=16, min_seq_len=32), [512, 1024, 2048, 4096]
    per_level = [flops(n, o) / (n * math.log2(n)) for n in lengths]
    assert max(per_level) / min(per_level) < 1.3
    dense = flops(4096, o._replace(min_seq_len=4096))
    assert flops(4096, o) < dense / 10


def test_a_later_token_is_never_read():
    """No gradient, and no change of the output, comes from what later tokens hold; they only steer the pairing."""
    query, key, value = (x.requires_grad_() for x in draw(32))
    output = hyper_attention(query, key, value, SCALE, options())
    for t in (0, 9, 20, 30):
        for gradient in torch.autograd.grad(output[0, :, t].sum(), (query, key, value), retain_graph=True):
            assert not gradient[0, :, t + 1 :].any()
    changed = torch.cat([value[:, :, :20], 5 * value[:, :, 20:]], 2)
    torch.testing.assert_close(hyper_attention(query, key, changed, SCALE, options())[:, :, :20], output[:, :, :20])
    query, key = (torch.cat([x[:, :, :20], -x[:, :, 20:]], 2) for x in (query, key))
    steered = hyper_attention(query, key, value, SCALE, options())
    torch.testing.assert_close(steered[:, :, :16], output[:, :, :16])  # the first half does not meet the second
    assert not torch.allclose(steered[:, :, 16:20], output[:, :, 16:20], atol=1e-4)


def model(seed: int = 0, layers: int = 2, **changes) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    spec = {"mixer": {**TINY, "seed": seed, **changes}, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    config = tiny_config("hf_moe", hidden_size=16, num_hidden_layers=layers, blocks={"b": spec}, initializer_range=0.3)
    return HfMoeForCausalLM(config).eval()


IDS = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))  # odd, and 13 / 2 > min_seq_len


def as_attention(hyper: HfMoeForCausalLM) -> HfMoeForCausalLM:
    """Softmax attention with the same weights."""
    mixer = hyper.config.blocks["b"]["mixer"]
    mixer = {"type": "attention", "qk_norm": mixer["qk_norm"], "qkv_bias": mixer["qkv_bias"]}
    block = {**hyper.config.blocks["b"], "mixer": mixer}
    config = HfMoeConfig(**{**hyper.config.to_dict(), "blocks": {"b": block}})
    attention = HfMoeForCausalLM(config).eval()
    attention.load_state_dict(hyper.state_dict())
    return attention


@torch.no_grad()
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_short_rows_are_softmax_attention_under_any_mask(implementation, extras):
    hyper = model(min_seq_len=8, qk_norm=extras, qkv_bias=extras)
    attention = as_attention(hyper)
    for each in (hyper, attention):
        each.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    for extra in ({}, {"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
        assert torch.equal(hyper(IDS, **extra).logits, attention(IDS, **extra).logits)
    assert not torch.allclose(model()(IDS).logits, attention(IDS).logits, atol=1e-3)  # min_seq_len 4 does estimate


@torch.no_grad()
def test_logits_are_reproducible():
    hyper = model()
    logits = hyper(IDS).logits
    torch.manual_seed(123)
    assert torch.equal(hyper(IDS).logits, logits) and torch.equal(model()(IDS).logits, logits)
    torch.testing.assert_close(torch.cat([hyper(row[None]).logits for row in IDS]), logits)
    assert not torch.allclose(model(seed=1)(IDS).logits, logits, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same(use_reentrant):
    hyper = model().train()
    hyper(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in hyper.named_parameters()}
    assert all(gradient.any() for gradient in expected.values())
    hyper.zero_grad()
    hyper.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        hyper.enable_input_require_grads()
    hyper(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in hyper.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def hides(case: str) -> dict:
    mask = torch.ones_like(IDS)
    if case == "left padding":
        mask[1, :2] = 0
    if case == "right padding":
        mask[1, -2:] = 0
    if case == "packed":
        return {"position_ids": torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1), "use_cache": False}
    return {"attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("case", ["left padding", "right padding", "packed", "whole"])
def test_estimating_needs_whole_rows(case, implementation):
    hyper = model()
    hyper.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):
        if case == "whole":
            torch.testing.assert_close(hyper(IDS, **hides(case)).logits, model()(IDS).logits)
            return
        with pytest.raises(ValueError, match="raise min_seq_len above half the length"):
            hyper(IDS, **hides(case))
    with pytest.raises(ValueError, match="not plainly causal"):
        hyper(IDS, attention_mask=torch.ones(2, 1, 13, 13, dtype=torch.bool))  # not causal


@torch.no_grad()
def test_a_mask_made_by_the_user():
    causal = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    torch.testing.assert_close(model()(IDS, attention_mask=causal).logits, model()(IDS).logits)


@torch.no_grad()
def test_what_continues_a_cache_attends_exactly():
    """Prefill is estimated; tokens and pieces of any length after it are softmax attention over all of the past."""
    hyper = model(layers=1)  # of one layer the keys do not depend on the attention
    attention = as_attention(hyper)
    longer = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    cache, outputs = DynamicCache(config=hyper.config), []
    for piece in longer.split([13, 1, 2, 8], dim=1):
        outputs.append(hyper(piece, past_key_values=cache).logits)
    assert cache.get_seq_length() == 24
    torch.testing.assert_close(outputs[0], hyper(longer[:, :13]).logits)
    torch.testing.assert_close(torch.cat(outputs[1:], 1), attention(longer).logits[:, 13:])
    cache = DynamicCache(config=hyper.config)
    pieces = [hyper(piece, past_key_values=cache).logits for piece in longer.split(6, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(longer).logits)  # short pieces: exact from the start


@torch.no_grad()
def test_generate():
    hyper = model()
    dynamic = hyper.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    static = hyper.generate(
        IDS,
        max_new_tokens=4,
        do_sample=False,
        cache_implementation="static",
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(static.logits))
    torch.testing.assert_close(dynamic.logits[0], hyper(IDS).logits[:, -1])
    beams = hyper.generate(IDS, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (2, 17)


def test_compiles_in_one_graph_and_still_refuses():
    hyper, mask = model(layers=1).train(), torch.ones_like(IDS)
    expected = hyper(IDS, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(hyper, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, attention_mask=mask, use_cache=False).logits, expected)
    mask[1, :2] = 0
    with pytest.raises(RuntimeError, match="padding, several packed sequences"):
        compiled(IDS, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_bf16_is_near_fp32():
    hyper = model()
    expected = hyper(IDS).logits
    error = (hyper.bfloat16()(IDS).logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.1


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"sample_size": 0}, "sample_size=0 must be at least 1"),
        ({"min_seq_len": 0}, "min_seq_len=0 must be at least 1"),
        ({"num_projections": 0}, "num_projections=0 must be between 1 and 24"),
        ({"num_projections": 25}, "num_projections=25 must be between"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
    ids=str,
)
def test_bad_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        model(**wrong)


def test_dropout_is_refused():
    spec = {"mixer": TINY, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    with pytest.raises(ValueError, match="set attention_dropout=0"):
        tiny_config("hf_moe", attention_dropout=0.1, blocks={"b": spec})
