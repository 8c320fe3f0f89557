"""SPT's sparse attention and its product quantiser against float64 loops over queries."""

import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_moe import MIXERS, HfMoeForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.ops.product_quantizer import ProductQuantizer, best_matches
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HEAD, HEADS, KEY_HEADS, TIME = 16, 8, 4, 2, 9


def config(**options):
    mixer = {"type": "sparse_attention", "codeword_size": 2, "num_codewords": 3, **options}
    spec = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=HEAD, blocks={"b": spec})


def build(**options) -> torch.nn.Module:
    """The mixer alone, in float64, with weights large enough to matter."""
    tiny = config(**options)
    torch.manual_seed(0)
    parts = dict(tiny.block(0)["mixer"])
    mixer = MIXERS[parts.pop("type")](tiny, 0, **parts).double().eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return mixer


def inputs() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Hidden states, cosines and sines, and the causal mask."""
    hidden_states = torch.randn(1, TIME, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = torch.outer(torch.arange(TIME, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    mask = torch.ones(1, 1, TIME, TIME, dtype=torch.bool).tril()
    return hidden_states, (angles.cos(), angles.sin()), mask


def code(x: Tensor, codebook: Tensor) -> list[int]:
    size = codebook.shape[2]
    return [
        min(range(len(words)), key=lambda i, p=x[m * size : (m + 1) * size], w=words: (p - w[i]).abs().sum().item())
        for m, words in enumerate(codebook)
    ]


def projected(w: naive.Weights, name: str, x: Tensor, h: int) -> Tensor:
    head = slice(h * HEAD, (h + 1) * HEAD)
    out = (w[f"{name}_proj.weight"] @ x)[head]
    if f"{name}_proj.bias" in w:
        out = out + w[f"{name}_proj.bias"][head]
    return naive.rms_norm(out, w[f"{name}_norm.weight"]) if f"{name}_norm.weight" in w else out


def reference(w: naive.Weights, xs: Tensor, keep: float, clamp: float | None = 10.0, rotated: bool = False) -> Tensor:
    """One query and one head at a time."""
    codebook, outputs = w["quantizer.weight"], []
    for t, x in enumerate(xs):
        mixed = []
        for h in range(HEADS):
            m = h // (HEADS // KEY_HEADS)
            plain_keys = [projected(w, "k", xs[j], m) for j in range(t + 1)]
            keys = [naive.rotate(k, j) for j, k in enumerate(plain_keys)]
            plain_query = projected(w, "q", x, h)
            query = naive.rotate(plain_query, t)
            mine = code(query if rotated else plain_query, codebook)
            theirs = [code(k, codebook) for k in (keys if rotated else plain_keys)]
            matches = [sum(a == b for a, b in zip(mine, c)) for c in theirs]
            number = min(int(keep), t + 1) if keep >= 1 else max(1, math.ceil((t + 1) * keep))
            best = sorted(range(t + 1), key=lambda j, c=matches: (-c[j], -j))[:number]
            scores = torch.stack([query @ keys[j] / math.sqrt(HEAD) for j in best])
            if clamp is not None:
                scores = scores.clamp(-clamp, clamp)
            values = [projected(w, "v", xs[j], m) for j in best]
            mixed.append(sum(a * v for a, v in zip(naive.softmax(scores), values)))
        outputs.append(w["o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.5},
        {"keep": 0.5, "rotated_codes": True},
        {"keep": 2},
        {"keep": 1},
        {"keep": 0.3, "clamp": 0.5},
        {"keep": 0.4, "clamp": None, "num_codewords": 5, "codeword_size": 4},
        {"keep": 0.4, "qkv_bias": True},
    ],
    ids=str,
)
def test_equals_the_loop_forward_and_backward(options):
    mixer, (hidden_states, tables, mask) = build(**options), inputs()
    hidden_states.requires_grad_()
    xs, weights = hidden_states[0].detach().requires_grad_(), naive.double(mixer)
    ours = mixer(hidden_states, tables, mask)[0][0]
    expected = reference(
        weights, xs, options.get("keep", 0.125), options.get("clamp", 10.0), options.get("rotated_codes", False)
    )
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(hidden_states.grad[0], xs.grad)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    assert mixer.quantizer.weight.grad is None  # choosing has no gradient, and this is no training


def test_norms_of_queries_and_keys():
    mixer, (hidden_states, tables, mask) = build(qk_norm=True, keep=0.5), inputs()
    ours = mixer(hidden_states, tables, mask)[0][0]
    torch.testing.assert_close(ours, reference(naive.double(mixer), hidden_states[0], 0.5), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_keys_without_a_clamp_are_softmax_attention():
    """The parameters are those of `attention`, and the codebook."""
    sparse = HfMoeForCausalLM(config(keep=100, clamp=None)).eval()
    block = {"mixer": {"type": "attention"}, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    dense = HfMoeForCausalLM(tiny_config("hf_moe", hidden_size=WIDTH, head_dim=HEAD, blocks={"b": block})).eval()
    info = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert all(name.endswith("quantizer.weight") for name in info.missing_keys) and not info.unexpected_keys
    ids = torch.arange(3, 14)[None]
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("keep", [0.125, 0.3, 1 / 3, 0.1, 3, 40])
def test_best_matches(keep):
    """Exactly as many as it says, none that matches less than one left out, and the latest of equals."""
    generator = torch.Generator().manual_seed(0)
    matches = torch.randint(0, 5, (2, 3, 20, 20), generator=generator).float()
    visible = (torch.rand(2, 1, 20, 20, generator=generator) < 0.7).tril()
    share = Fraction(keep).limit_denominator(10**6) if keep < 1 else Fraction(1)
    kept = best_matches(matches, visible, share, None if keep < 1 else keep)
    for b, h, t in [(b, h, t) for b in range(2) for h in range(3) for t in range(20)]:
        seen = visible[b, 0, t].nonzero().flatten().tolist()
        number = min(keep, len(seen)) if keep >= 1 else math.ceil(len(seen) * share)
        best = sorted(seen, key=lambda j, row=matches[b, h, t]: (-row[j].item(), -j))[:number]
        assert kept[b, h, t].nonzero().flatten().tolist() == sorted(best)


def test_codes_are_the_nearest_codewords():
    quantizer = ProductQuantizer(4, 16, 2).double()
    quantizer.init_weights(0.02)
    assert 0.7 < quantizer.weight.std() < 1.3  # N(0, 1), whatever the model's initializer_range
    vectors = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = quantizer.encode(vectors)
    assert codes.shape == (3, 5, 4)
    assert codes[1, 2].tolist() == code(vectors[1, 2], quantizer.weight)
    quantizer.bfloat16()
    assert torch.equal(quantizer.encode(vectors.bfloat16()), quantizer.encode(vectors.bfloat16().float()))


def quantizer_loss(zs: Tensor, codebook: Tensor) -> Tensor:
    """MSE(soft, hard) + MSE(z, hard), soft weights softmax(-log max(L1 distance, 1e-5))."""
    size, errors = codebook.shape[2], []
    for z in zs:
        for m, words in enumerate(codebook):
            piece = z[m * size : (m + 1) * size]
            distances = torch.stack([(piece - word).abs().sum() for word in words])
            hard = words[int(distances.argmin())]
            soft = naive.softmax(-torch.log(distances.clamp(min=1e-5))) @ words
            errors += [(soft - hard) ** 2 + (piece - hard) ** 2]
    return torch.cat(errors).mean()


def test_the_loss_of_the_quantizer():
    quantizer = ProductQuantizer(4, 3, 2).double()
    quantizer.init_weights(0.02)
    vectors = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    codebook, zs = (x.detach().clone().requires_grad_() for x in (quantizer.weight, vectors.flatten(0, 1)))
    ours, expected = quantizer.loss(vectors), quantizer_loss(zs, codebook)
    torch.testing.assert_close(ours, expected)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(quantizer.weight.grad, codebook.grad)
    torch.testing.assert_close(vectors.grad.flatten(0, 1), zs.grad)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    torch.testing.assert_close(quantizer.loss(vectors, mask), quantizer_loss(vectors[mask], codebook))


@pytest.mark.parametrize("coefficient", [0.01, 0.5])
def test_training_hands_the_codebook_its_gradient_and_nobody_else(coefficient):
    """The output's own gradients are as without it; padding does not count."""
    mixer, (hidden_states, tables, mask) = build(quantizer_loss_coef=coefficient), inputs()
    tokens = torch.arange(TIME) != 4
    mask = mask & tokens
    context = ForwardContext(token_mask=tokens)
    gradients = {}
    for training in (False, True):
        mixer.train(training).zero_grad()
        output = mixer(hidden_states, tables, mask, context=context)[0]
        output.square().sum().backward()
        gradients[training] = {name: p.grad for name, p in mixer.named_parameters()}
    for name, gradient in gradients[False].items():
        if name != "quantizer.weight":
            torch.testing.assert_close(gradients[True][name], gradient)
    codebook = mixer.quantizer.weight.detach().clone().requires_grad_()
    real = hidden_states[0, tokens]
    heads = {
        name: (real @ p.weight.t()).view(-1, HEAD).detach() for name, p in (("q", mixer.q_proj), ("k", mixer.k_proj))
    }
    loss = quantizer_loss(heads["q"], codebook) + quantizer_loss(heads["k"], codebook)
    (coefficient * loss).backward()
    torch.testing.assert_close(gradients[True]["quantizer.weight"], codebook.grad)
    query, key = (mixer_heads(p, hidden_states) for p in (mixer.q_proj, mixer.k_proj))
    torch.testing.assert_close(mixer.quantizer_loss(query, key, tokens), loss)


def mixer_heads(projection: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    return projection(hidden_states).unflatten(-1, (-1, HEAD)).transpose(1, 2)


def test_a_codebook_that_nobody_trains():
    """Coefficient zero, or a frozen codebook, as under LoRA: no gradient, and no work for one."""
    hidden_states, tables, mask = inputs()
    for frozen in (False, True):
        mixer = build(quantizer_loss_coef=0.01 if frozen else 0.0).train()
        mixer.quantizer.requires_grad_(not frozen)
        mixer(hidden_states, tables, mask)[0].sum().backward()
        assert mixer.quantizer.weight.grad is None and mixer.q_proj.weight.grad.any()


def test_a_plain_training_loop_fits_the_codebook():
    torch.manual_seed(0)
    model = HfMoeForCausalLM(config(num_codewords=8)).train()
    ids = torch.randint(3, 100, (4, 16))
    mixer = model.model.layers[0].self_attn
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def fit() -> float:
        heads = []
        mixer.q_proj.register_forward_hook(lambda m, i, o: heads.append(o))
        with torch.no_grad():
            model(ids)
        query = heads[-1].unflatten(-1, (-1, HEAD)).transpose(1, 2)
        return (mixer.quantizer.loss(query) / query.square().mean()).item()

    before = fit()
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert fit() < 0.5 * before


@torch.no_grad()
def test_the_cache_holds_keys_codes_and_values():
    model = HfMoeForCausalLM(config()).eval()
    cache = DynamicCache(config=model.config)
    model(torch.arange(3, 12)[None], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.shape == (1, KEY_HEADS, 9, HEAD + 4) and layer.values.shape == (1, KEY_HEADS, 9, HEAD)
    codes = layer.keys[..., HEAD:]
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < 3


@torch.no_grad()
def test_a_token_that_sees_nothing_gets_nothing():
    hidden_states, tables, mask = inputs()
    mask[..., 4, :] = False
    output, weights, losses = build(keep=3)(hidden_states, tables, mask)
    assert not output[:, 4].any() and output.isfinite().all() and not weights[:, :, 4].any() and losses is None


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"keep": 0.0}, "keep=0.0 must be a share"),
        ({"keep": -1}, "keep=-1 must be a share"),
        ({"keep": 2.5}, "keep=2.5 must be a share of the keys between 0 and 1, or a whole number"),
        ({"codeword_size": 3}, "codeword_size=3 must divide head_dim=8"),
        ({"codeword_size": 0}, "codeword_size=0 must divide head_dim=8"),
        ({"num_codewords": 1}, "num_codewords=1 must be between 2 and 256"),
        ({"num_codewords": 257}, "num_codewords=257 must be between"),
        ({"clamp": 0.0}, "clamp=0.0 must be positive"),
        ({"quantizer_loss_coef": -1.0}, "quantizer_loss_coef=-1.0 must not be negative"),
    ],
    ids=str,
)
def test_bad_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
