"""Multi-token prediction against a naive float64 loop, and what must not change it or be changed by it."""

import pytest
import torch
import torch.nn.functional as F
from naive import double, rms_norm, rotate, sigmoid, silu, softmax
from torch import Tensor

from hf_moe import LingConfig, LingForCausalLM
from hf_moe.testing import tiny_config

DEPTH, WEIGHT, EPS = 2, 0.3, 1e-6
X = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def build(depth: int = DEPTH, **overrides) -> LingForCausalLM:
    """A tiny Ling in training; biases and a large initialisation make every part matter."""
    sizes = {"vocab_size": 97, "initializer_range": 0.3, "num_experts": 6, "num_experts_per_tok": 2, "n_group": 3}
    fields = {**sizes, "topk_group": 2, "num_nextn_predict_layers": depth, "mtp_loss_scaling_factor": WEIGHT}
    torch.manual_seed(0)
    model = LingForCausalLM(tiny_config("ling", **{**fields, "router_z_loss_coef": 0.0, **overrides}))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    model.set_experts_implementation("batched_mm")  # grouped_mm knows no float64
    return model.train()


def experts(w: dict, name: str, x: Tensor) -> Tensor:
    """Sigmoid scores; the two groups whose two best biased scores sum highest; two experts; shared expert."""
    scores = sigmoid(w[name + "gate.weight"] @ x)
    biased = (scores + w[name + "gate.e_score_correction_bias"]).tolist()
    groups = sorted(range(3), key=lambda g: -sum(sorted(biased[2 * g : 2 * g + 2])))[:2]
    chosen = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -biased[e])[:2]
    y = mlp(w, name + "shared_expert.", x)
    for e in chosen:
        gate, up = (w[name + "experts.gate_up_proj"][e] @ x).chunk(2)
        weight = 2.5 * scores[e] / sum(scores[c] for c in chosen)
        y = y + weight * (w[name + "experts.down_proj"][e] @ (silu(gate) * up))
    return y


def mlp(w: dict, name: str, x: Tensor) -> Tensor:
    return w[name + "down_proj.weight"] @ (silu(w[name + "gate_proj.weight"] @ x) * (w[name + "up_proj.weight"] @ x))


def block(w: dict, name: str, xs: list[Tensor], rotary: int, dense: bool) -> list[Tensor]:
    normed = [rms_norm(x, w[name + "input_layernorm.weight"], EPS) for x in xs]
    mixed = partly_rotated_attention(w, name + "self_attn.", normed, rotary)
    xs = [x + m for x, m in zip(xs, mixed)]
    normed = [rms_norm(x, w[name + "post_attention_layernorm.weight"], EPS) for x in xs]
    return [x + (mlp if dense else experts)(w, name + "mlp.", n) for x, n in zip(xs, normed)]


def partly_rotated_attention(w: dict, name: str, xs: list[Tensor], rotary: int) -> list[Tensor]:
    """Grouped-query attention over normed heads of which the first `rotary` entries turn; four heads, two of keys."""
    d = w[name + "q_norm.weight"].numel()

    def heads(x: Tensor, t: int, matrix: str, norm: str) -> list[Tensor]:
        normed = [rms_norm(head, w[name + norm], EPS) for head in (w[name + matrix] @ x).split(d)]
        return [torch.cat([rotate(head[:rotary], t, 600000.0), head[rotary:]]) for head in normed]

    keys = [heads(x, t, "k_proj.weight", "k_norm.weight") for t, x in enumerate(xs)]
    values = [(w[name + "v_proj.weight"] @ x).split(d) for x in xs]
    outputs = []
    for t, x in enumerate(xs):
        mixed = []
        for h, query in enumerate(heads(x, t, "q_proj.weight", "q_norm.weight")):
            weights = softmax(torch.stack([query @ keys[s][h // 2] / d**0.5 for s in range(t + 1)]))
            mixed.append(sum(weights[s] * values[s][h // 2] for s in range(t + 1)))
        outputs.append(w[name + "o_proj.weight"] @ torch.cat(mixed))
    return outputs


def losses_of(w: dict, ids: list[int], head: str = "lm_head.weight") -> list[list[Tensor]]:
    """Cross-entropies of the next token, of the one after it, ...: one list per depth."""
    embedding, rotary = w["model.embed_tokens.weight"], 4
    xs = [embedding[i] for i in ids]
    for layer in range(2):
        xs = block(w, f"model.layers.{layer}.", xs, rotary, dense=layer == 0)
    xs = [rms_norm(x, w["model.norm.weight"], EPS) for x in xs]
    found = [entropies(w[head], xs, ids[1:])]
    for k in range(1, DEPTH + 1):
        name = f"mtp.{k - 1}."
        joint = []
        for t, x in enumerate(xs):
            ahead = embedding[ids[t + k]] if t + k < len(ids) else torch.zeros_like(x)
            both = [rms_norm(ahead, w[name + "enorm.weight"], EPS), rms_norm(x, w[name + "hnorm.weight"], EPS)]
            joint.append(w[name + "eh_proj.weight"] @ torch.cat(both))
        xs = block(w, name + "mtp_block.", joint, rotary, dense=False)
        xs = [rms_norm(x, w[name + "final_layernorm.weight"], EPS) for x in xs]
        found.append(entropies(w[head], xs, ids[1 + k :]))
    return found


def entropies(head: Tensor, xs: list[Tensor], targets: list[int]) -> list[Tensor]:
    return [torch.logsumexp(head @ x, 0) - (head @ x)[target] for x, target in zip(xs, targets)]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def test_loss_and_gradients():
    model = build()
    w = double(model)
    rows = [losses_of(w, row) for row in X.tolist()]
    by_depth = [mean([value for row in rows for value in row[k]]) for k in range(DEPTH + 1)]
    expected = by_depth[0] + WEIGHT * (by_depth[1] + by_depth[2]) / DEPTH
    expected.backward()
    loss = model.double()(X, labels=X).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)  # cross-entropy is float32
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=2e-6, rtol=1e-5, msg=name)


def test_sums_are_divided_by_the_labels_of_the_step():
    model, w = build(), double(build())
    rows = [losses_of(w, row) for row in X.tolist()]
    sums = [sum(value for row in rows for value in row[k]) for k in range(DEPTH + 1)]
    expected = (sums[0] + WEIGHT * (sums[1] + sums[2]) / DEPTH) / 50
    loss = model.double()(X, labels=X, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)  # cross-entropy is float32


def test_only_training_pays():
    """Same logits, and in evaluation the same loss, whatever the number of prediction layers."""
    model, plain = build().eval(), build(0).eval()
    info = plain.load_state_dict(model.state_dict(), strict=False)
    assert not info.missing_keys and all(name.startswith("mtp.") for name in info.unexpected_keys)
    for evaluated, expected in ((model(X, labels=X), plain(X, labels=X)), (model.train()(X), plain.train()(X))):
        torch.testing.assert_close(evaluated.logits, expected.logits)
    torch.testing.assert_close(model.eval()(X, labels=X).loss, plain.eval()(X, labels=X).loss)
    assert model.train()(X, labels=X).loss > plain.train()(X, labels=X).loss + 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, pad = build(router_aux_loss_coef=0.01), torch.zeros(2, 3, dtype=torch.long)
    order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
    mask, labels = order(pad, torch.ones_like(X)), order(pad - 100, X)
    if side == "left":
        labels[:, 3] = -100  # nothing stands before the first token
    losses = [model(order(pad, X), attention_mask=mask, labels=labels).loss, model(X, labels=X).loss]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for padded, alone in zip(*gradients):
        torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-4)


def test_packed_rows_are_separate_sequences():
    """No layer predicts the next sequence's tokens, even where the labels of a border are not masked."""
    model = build(router_aux_loss_coef=0.01, router_balance_loss="sequence").double()
    packed, positions = X.view(1, -1), torch.arange(9).repeat(2)[None]
    labels = packed.clone()
    labels[0, 9] = -100
    count = torch.tensor(16)
    together = model(packed, position_ids=positions, labels=labels, num_items_in_batch=count).loss
    apart = model(X, labels=X, num_items_in_batch=count).loss
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (together, apart)]
    for packed_grad, grad in zip(*gradients):
        torch.testing.assert_close(packed_grad, grad)


def test_short_rows_have_nothing_further_to_predict():
    model, plain = build(), build(0)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(X[:, :2], labels=X[:, :2]).loss, plain(X[:, :2], labels=X[:, :2]).loss)


def test_ready_shifted_labels_and_embeddings_say_the_same():
    model = build()
    expected = model(X, labels=X).loss
    shifted = F.pad(X[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(X, labels=X, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(X), labels=X).loss, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build(router_aux_loss_coef=0.01)
    model(X, labels=X, use_cache=False).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    loads = [module.loads.clone() for module in model.modules() if getattr(module, "loads", None) is not None]
    for module in model.modules():
        if hasattr(module, "loads"):
            module.loads = None
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(X, labels=X, use_cache=False).loss.backward()
    for parameter, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad)
    again = [module.loads for module in model.modules() if getattr(module, "loads", None) is not None]
    assert len(loads) == 1 + DEPTH and all(torch.equal(a, b) for a, b in zip(loads, again))


def test_balance_losses_of_the_prediction_layers_count():
    model = build(router_aux_loss_coef=0.5)
    with_balance = model(X, labels=X)
    model.config.router_aux_loss_coef = 0.0
    added = with_balance.loss - model(X, labels=X).loss
    assert added > 0.5 * with_balance.aux_loss + 0.3  # each of two more layers adds about 0.5


def test_round_trip_in_16_bits(tmp_path):
    model = build().bfloat16()
    model.save_pretrained(tmp_path)
    again, info = LingForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    biases = [b for name, b in again.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 1 + DEPTH and all(b.dtype == torch.float32 and b.any() for b in biases)
    released, info = LingForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not len(released.mtp)


def test_errors():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=-1 must be 0"):
        LingConfig(num_nextn_predict_layers=-1)
    with pytest.raises(ValueError, match="num_groups=7 does not split 256 experts"):
        LingConfig(n_group=7)
