"""The cache battery: every way in which tokens can reach a model must give the logits of the plain forward pass."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from hf_moe.modeling.cache import RecurrentLayer

sys.path.insert(0, str(Path(__file__).parent))
import specs
from specs import close

X = specs.tokens()


@pytest.fixture(params=specs.MIXER_ROWS)
def model(request):
    return specs.build(request.param)


def is_sliding(model) -> bool:
    return "sliding_attention" in model.config.layer_types


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunked_prefill_with_padding(model, side):
    """Rows of different length in chunks that cut through the padding, then single steps."""
    lengths, time = torch.tensor([10, 5]), 10
    real = torch.arange(time) < lengths[:, None]
    ids, mask = X * real, real.long()
    if side == "left":
        ids = torch.stack([row.roll(time - n.item()) for row, n in zip(ids, lengths)])
        mask = mask.flip(1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache, seen = DynamicCache(config=model.config), 0
    for size in (3, 4, 3):
        part = slice(seen, seen + size)
        model(
            ids[:, part],
            attention_mask=mask[:, : seen + size],
            position_ids=position_ids[:, part],
            past_key_values=cache,
        )
        seen += size
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    if side == "right" and is_sliding(model):  # its cache counts columns
        with pytest.raises(ValueError, match="padded on the right"):
            model(torch.tensor([[7], [9]]), attention_mask=mask[:, : seen + 1], past_key_values=cache)
        return
    for step, token in enumerate(torch.tensor([[[7], [9]], [[5], [3]]])):
        positions = (lengths + step)[:, None]
        logits = model(token, attention_mask=mask[:, : seen + 1], position_ids=positions, past_key_values=cache).logits
        seen += 1
    for row, length in enumerate(lengths):
        alone = torch.cat([X[row, :length], torch.tensor([[7, 5], [9, 3]])[row]])[None]
        close(logits[row, -1], model(alone).logits[0, -1])


PACKED = {
    "position_ids": {"position_ids": torch.cat([torch.arange(3), torch.arange(6), torch.arange(5)])[None]},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 9, 14], dtype=torch.int32)},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 3 + [1] * 6 + [2] * 5], dtype=torch.int32)},
}
PACKED["ones"] = {**PACKED["position_ids"], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
PACKED["trl"] = {**PACKED["position_ids"], **PACKED["cu_seq_lens_q"], **PACKED["seq_idx"]}


@pytest.mark.parametrize("how", PACKED)
def test_packed_sequences_do_not_meet(model, how):
    """However they are told apart: logits and gradients of the separate sequences."""
    pieces = [X[:1, :3], X[1:, :6], X[1:, 5:]]  # a longer one behind a shorter one
    packed = model(torch.cat(pieces, 1), **PACKED[how]).logits
    close(packed, torch.cat([model(piece).logits for piece in pieces], 1))
    packed.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for piece in pieces:
        model(piece).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5 * scale, rtol=1e-4)


@torch.no_grad()
def test_packed_rows_with_padding(model):
    """Two sequences per row, padding between and behind them."""
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    logits = model(X, attention_mask=mask, position_ids=position_ids).logits
    for row, part in ((0, slice(0, 4)), (0, slice(5, 8)), (1, slice(0, 2)), (1, slice(2, 9))):
        close(logits[row, part], model(X[row : row + 1, part]).logits[0])


@torch.no_grad()
def test_packed_rows_compile_in_one_graph(model):
    """While a graph is traced nobody knows what stands in `position_ids`: the graph serves packed rows and others."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for position_ids in (torch.tensor([[*range(6), *range(4)]]), torch.arange(10)[None]):
        inputs = {"position_ids": position_ids, "use_cache": False}
        close(compiled(X, **inputs).logits, model(X, **inputs).logits)


@torch.no_grad()
def test_packed_rows_refuse_a_cache(model):
    with pytest.raises(ValueError, match="packed"):
        model(
            X, position_ids=torch.tensor([[*range(6), *range(4)]]), past_key_values=DynamicCache(config=model.config)
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_ready_masks_are_honoured_or_refused(model, kind):
    """A mask per pair of tokens: here two sequences in one row, each causal by itself."""
    apart = torch.block_diag(torch.ones(6, 6), torch.ones(4, 4)).tril().bool()[None, None].expand(2, 1, -1, -1)
    mask = (
        apart if kind == "boolean" else torch.zeros(2, 1, 10, 10).masked_fill(~apart, torch.finfo(torch.float32).min)
    )
    position_ids = torch.tensor([[*range(6), *range(4)]])
    if "recurrent" in model.config.layer_types:
        with pytest.raises(ValueError, match="two-dimensional padding mask"):
            model(X, attention_mask=mask, position_ids=position_ids)
        return
    if is_sliding(model):
        pytest.skip("every kind of layer gets the same ready mask, and this one has no window")
    logits = model(X, attention_mask=mask, position_ids=position_ids).logits
    close(logits, torch.cat([model(X[:, :6]).logits, model(X[:, 6:]).logits], 1))
    if "masked_attention" in model.config.layer_types:
        with pytest.raises(ValueError, match="needs a boolean mask"):
            model(X, attention_mask=torch.randn(2, 1, 10, 10))


@torch.no_grad()
@pytest.mark.parametrize("steps", [(10,), (4, 6), (4, 3, 1, 1, 1)], ids=str)
def test_crop_goes_back(model, steps):
    """Whatever pieces the last tokens came in, a crop and other tokens after it leave no trace of them."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for piece in X.split(list(steps), 1):
        model(piece, past_key_values=cache)
    for count in (3,) if is_sliding(model) else (2, 1):  # Transformers' sliding cache forgets the rest at each crop
        cache.crop(-count)
    assert cache.get_seq_length() == 7
    other = specs.tokens(2, 4, seed=1)
    logits = model(other[:, :2], past_key_values=cache).logits
    cache.crop(-1)
    logits = torch.cat([logits[:, :1], model(other[:, 1:], past_key_values=cache).logits], 1)
    cache.crop(0)
    close(logits, model(torch.cat([X[:, :7], other], 1)).logits[:, 7:])
    assert cache.get_seq_length() == 11


@torch.no_grad()
def test_crop_without_recording_is_refused(model):
    if "recurrent" not in model.config.layer_types:
        pytest.skip("keys and values can always be cropped")
    cache = DynamicCache(config=model.config)
    model(X, past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(X, past_key_values=cache)
    with pytest.raises(ValueError, match="only the last 10"):
        cache.crop(-11)


@pytest.mark.allow_warnings("Passing `generation_config` together")  # Transformers' own call to its draft model
@torch.no_grad()
def test_assisted_decoding(model):
    """A draft model that is nearly always wrong, and one that is always right."""
    prompt, kwargs = X[:1], {"max_new_tokens": 12, "do_sample": False}
    greedy = model.generate(prompt, **kwargs)
    poor = specs.build("dense", seed=3)
    for draft in (poor, copy.deepcopy(model)):
        draft.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(model.generate(prompt, assistant_model=draft, **kwargs), greedy)
    assert torch.equal(poor.generate(prompt, assistant_model=model, **kwargs), poor.generate(prompt, **kwargs))


@torch.no_grad()
def test_rows_of_a_cache(model):
    """Repeat, select and reorder the sequences of a batch, in the middle of recorded tokens too."""
    cache = DynamicCache(config=model.config)
    model(X[:, :4], past_key_values=cache)
    cache.activate_past_recording()
    model(X[:, 4:7], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    cache.crop(-2)
    rows = torch.cat([X[[0, 1, 0], :5], X[[0, 1, 0], 7:]], 1)
    logits = model(rows[:, -3:], past_key_values=cache).logits
    close(logits, model(rows).logits[:, -3:])


@torch.no_grad()
def test_a_copied_prompt_serves_several_continuations(model):
    """Transformers' recipe for shared prompts: fill a cache once, continue deep copies of it."""
    prompt = DynamicCache(config=model.config)
    model(X[:, :6], past_key_values=prompt)
    for seed in (1, 2):
        tail = specs.tokens(2, 3, seed=seed)
        logits = model(tail, past_key_values=copy.deepcopy(prompt)).logits
        close(logits, model(torch.cat([X[:, :6], tail], 1)).logits[:, 6:])


@torch.no_grad()
def test_reset_starts_anew(model):
    cache = DynamicCache(config=model.config)
    expected = model(X, past_key_values=cache).logits
    if is_sliding(model) or "full_attention" in model.config.layer_types or "masked_attention" in str(cache.layers):
        pytest.skip("Transformers' dynamic layers keep their zeroed keys on reset")
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(X, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_recurrent_states_are_float32_in_bf16(model):
    if "recurrent" not in model.config.layer_types:
        pytest.skip("no recurrent layer")
    half, cache = copy.deepcopy(model).bfloat16(), DynamicCache(config=model.config)
    half(X, past_key_values=cache)
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            # what a convolution looks back on are inputs, a few columns of them; everything else accumulates
            accumulating = [state for state in layer.states if state.shape[-1] > 3]
            assert all(state.dtype == torch.float32 for state in accumulating)


@torch.no_grad()
def test_long_decoding_in_bf16(model):
    """Stepping through a state in bf16 stays as near to float32 as the whole row in bf16 does."""
    expected, half = model(X).logits, copy.deepcopy(model).bfloat16()
    cache = DynamicCache(config=model.config)
    stepped = torch.cat([half(x, past_key_values=cache).logits for x in X.split(1, 1)], 1).float()
    error = (stepped - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.1, error


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(model):
    """`generate` compiles the decoding step for a static cache; on CPU it has to be asked to."""
    expected = model.generate(X, max_new_tokens=6, do_sample=False)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    compiled = model.generate(
        X, max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=compile_config
    )
    assert torch.equal(compiled, expected)


def test_trains_with_a_cache(model):
    """The gradient through a continued cache is that of the whole row."""
    cache = DynamicCache(config=model.config)
    for piece in X.split([4, 3, 3], 1):
        logits = model(piece, past_key_values=cache).logits
    logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(X).logits[:, -3:].square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5 * scale, rtol=1e-4)
