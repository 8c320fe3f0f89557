"""Every combination of parts, in one small model, must honour the same contract."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

import hf_moe
from hf_moe.modeling.parts import Part
from hf_moe.modeling.routers import Router

sys.path.insert(0, str(Path(__file__).parent))
import specs
from specs import close

X = specs.tokens()


@pytest.fixture(params=specs.ROWS)
def model(request):
    return specs.build(request.param)


def test_every_part_is_in_the_suite():
    def kinds(rows):
        return {row["type"] for row in rows.values()}

    assert kinds(specs.MIXERS) == hf_moe.MIXERS.keys()
    assert kinds(specs.ROUTERS) == hf_moe.ROUTERS.keys()
    assert kinds(specs.EXPERTS) == hf_moe.EXPERTS.keys()
    blocks = [block for row in specs.ROWS.values() for block in row.values()]
    assert kinds(dict(enumerate(blocks))) == hf_moe.BLOCKS.keys()
    assert {block["feed_forward"]["type"] for block in blocks if "feed_forward" in block} == set(hf_moe.FEED_FORWARDS)


@torch.no_grad()
def test_causal(model):
    changed = X.clone()
    changed[:, 7:] = 5
    close(model(changed).logits[:, :7], model(X).logits[:, :7])
    assert not torch.allclose(model(changed).logits[:, 7:], model(X).logits[:, 7:], atol=1e-3)


@torch.no_grad()
def test_only_what_says_so_spans_the_batch_in_training(model):
    """BatchNorm, or one draw per forward pass, lets tokens decide about each other; nothing else may."""
    if any(module.spans_batch for module in model.modules() if isinstance(module, Part)):
        pytest.skip("says so")
    changed, outputs = X.clone(), []
    changed[0, 7:], changed[1] = 5, 6
    for ids in (changed, X):
        torch.manual_seed(0)
        outputs.append(model.train()(ids, use_cache=False).logits[0, :7])
    close(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[6, 1, 1, 1, 1], [4, 3, 3], [1, 9]], ids=str)
def test_cached_equals_uncached(model, pieces):
    cache, outputs = DynamicCache(config=model.config), []
    for piece in X.split(pieces, dim=1):
        outputs.append(model(piece, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == X.shape[1]
    close(torch.cat(outputs, 1), model(X, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    pad, real = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(X)
    ids, mask = ([pad, X], [pad, real]) if side == "left" else ([X, pad], [real, pad])
    logits = model(torch.cat(ids, 1), attention_mask=torch.cat(mask, 1)).logits
    close(logits[:, 3:] if side == "left" else logits[:, :-3], model(X).logits)


@torch.no_grad()
def test_right_padding_then_decoding(model):
    """Rows of different length, padded on the right, prefilled together, then continued one token at a time."""
    lengths, cache = torch.tensor([10, 6]), DynamicCache(config=model.config)
    mask = (torch.arange(10) < lengths[:, None]).long()
    model(X * mask, attention_mask=mask, past_key_values=cache, use_cache=True)
    if "sliding_attention" in model.config.layer_types:
        pytest.skip("refused, which the cache battery tests")
    token, mask = torch.tensor([[7], [9]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    logits = model(
        token, attention_mask=mask, past_key_values=cache, position_ids=lengths[:, None], use_cache=True
    ).logits
    for row, length in enumerate(lengths):
        alone = model(torch.cat([X[row : row + 1, :length], token[row : row + 1]], 1)).logits[:, -1]
        close(logits[row], alone)


@torch.no_grad()
def test_batch_equals_single(model):
    close(torch.cat([model(row[None]).logits for row in X]), model(X).logits)


@torch.no_grad()
def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(again) is type(model) and again.config.blocks == model.config.blocks
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    close(again(X).logits, model(X).logits, 0)


@torch.no_grad()
def test_everything_can_be_initialised_again(model):
    """`from_pretrained` makes models without content, and initialises what a checkpoint lacks."""
    with torch.device("meta"):
        empty = type(model)(model.config).to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    missed = [name for name, tensor in empty.state_dict(keep_vars=True).items() if not tensor.isfinite().all()]
    assert not missed and all(buffer.isfinite().all() for buffer in empty.buffers())
    assert empty(X).logits.isfinite().all()


@torch.no_grad()
def test_attention_backends_agree(model):
    model.set_attn_implementation("eager")
    expected = model(X).logits
    model.set_attn_implementation("sdpa")
    close(model(X).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_agrees(model, padded):
    mask = torch.ones_like(X)
    mask[1, :3] = 0 if padded else 1
    expected = model(X, attention_mask=mask).logits[:, 3:]
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes a minute on a CPU
        close(model(X, attention_mask=mask).logits[:, 3:], expected)


@torch.no_grad()
def test_experts_backends_agree(model):
    model.set_experts_implementation("eager")
    expected = model(X).logits
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        close(model(X).logits, expected)


def gradients(model, **inputs):
    """Loss and gradients of one training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # for what draws
    loss = model(X, labels=X, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_learns(model):
    model.config.router_z_loss_coef = 0.01
    _, grads = gradients(model)
    # an expert that no token chose gets a zero gradient, never none
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model, use_reentrant):
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 1.0, 0.1
    loss, expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    checkpointed_loss, grads = gradients(model)
    close(checkpointed_loss, loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        close(grad, expected[name])


@torch.no_grad()
def test_bf16_is_near_fp32(model):
    expected = model(X).logits
    logits = copy.deepcopy(model).bfloat16()(X).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # a token near a routing boundary may change experts under rounding: the median tells whether the formula agrees
    assert error.median() < 0.1, error


def test_autocast_trains(model):
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X, labels=X).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_lora(model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    stacked = [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]
    stacked = [n for n in stacked if "layers.0" in n or "model.shared." in n]
    base, expected = copy.deepcopy(model), model(X).logits.detach()
    linear = {
        n.split(".")[-1] for n, m in model.named_modules() if "self_attn" in n and isinstance(m, torch.nn.Linear)
    }
    config = LoraConfig(r=2, target_modules=linear, target_parameters=stacked, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    assert not torch.allclose(adapted(X).logits, expected, atol=1e-3)
    adapted(X, labels=X).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert len([name for name in trained if "experts" in name]) == 2 * len(stacked)
    with torch.no_grad():
        logits = adapted.eval()(X).logits
        adapted.save_pretrained(tmp_path)
        close(PeftModel.from_pretrained(base, tmp_path).eval()(X).logits, logits)
        close(adapted.merge_and_unload()(X).logits, logits, 1e-4)


@torch.no_grad()
def test_generate(model):
    mask = torch.ones_like(X)
    mask[1, :4] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
    cached = model.generate(X, **kwargs, return_dict_in_generate=True)
    uncached = model.generate(X, **kwargs, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(torch.stack(cached.logits), torch.stack(uncached.logits), 1e-4)
    alone = model.generate(X[1:, 4:], max_new_tokens=5, do_sample=False)
    assert torch.equal(alone[0, -5:], cached.sequences[1, -5:])


@torch.no_grad()
def test_generate_beams_samples_and_looks_up(model):
    beams = [
        model.generate(X, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*beams)
    samples = []
    for cached in (True, False):
        torch.manual_seed(0)
        samples.append(model.generate(X, max_new_tokens=5, do_sample=True, use_cache=cached))
    assert torch.equal(*samples)
    greedy = model.generate(X[:1], max_new_tokens=8, do_sample=False)
    if "sliding_attention" not in model.config.layer_types:  # Transformers cannot crop a full sliding window
        assert torch.equal(
            model.generate(X[:1], max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), greedy
        )
    static = model.generate(X[:1], max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(static, greedy)


@torch.no_grad()
@pytest.mark.parametrize("row", specs.FEED_FORWARD_ROWS)
def test_compiles_in_one_graph(row):
    """Every kind of feed-forward; the cache battery compiles every mixer."""
    model = specs.build(row)
    expected = model(X).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(X).logits, expected)


def test_sequence_classification(model):
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels = 3
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.cat([X, torch.zeros(2, 3, dtype=torch.long)], 1)
    logits = classifier(ids, attention_mask=(ids != 0).long()).logits
    assert logits.shape == (2, 3)
    close(logits, classifier(X).logits)
    loss = classifier(X, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite() and classifier.score.weight.grad is not None


def test_router_outputs(model):
    sizes = []  # of the routers in the order of their calls: one may be called several times
    for name, module in model.named_modules():
        if isinstance(module, Router) and ".mlp.gate." in f"{name}.":
            module.register_forward_hook(lambda gate, *_: sizes.append(gate.num_experts))
    outputs = model(X, output_router_logits=True, output_hidden_states=True)
    assert [logits.shape for logits in outputs.router_logits] == [(20, size) for size in sizes]
    assert len(outputs.hidden_states) == len(model.model.layers) + 1
    sparse = [name for name, module in model.named_modules() if "mlp" in name and hasattr(module, "gate")]
    assert (outputs.aux_loss is None) == (not sparse)
