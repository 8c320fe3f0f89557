"""DeepSeekMoE against a naive float64 loop over tokens and experts."""

import pytest
import torch
from naive import attention, double, rms_norm, silu, softmax
from torch import Tensor

from hf_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from hf_moe.testing import tiny_config

ALPHA, TOP_K, EXPERTS = 0.1, 2, 5
X = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def build(**overrides) -> DeepseekMoeForCausalLM:
    sizes = {"vocab_size": 97, "initializer_range": 0.3, "num_experts": EXPERTS, "router_aux_loss_coef": ALPHA}
    torch.manual_seed(0)
    config = tiny_config("deepseek_moe", **{**sizes, "num_hidden_layers": 3, **overrides})
    model = DeepseekMoeForCausalLM(config).double().train()
    model.set_experts_implementation("batched_mm")  # grouped_mm knows no float64
    return model


def mlp(w: dict, name: str, x: Tensor, part: slice = slice(None)) -> Tensor:
    """The neurons of `part`: one shared expert of several, which are stored side by side."""
    gate, up = (w[name + f"{half}_proj.weight"][part] @ x for half in ("gate", "up"))
    return w[name + "down_proj.weight"][:, part] @ (silu(gate) * up)


def mixture(w: dict, name: str, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Eq. 9 to 11: two shared experts, and the chosen ones by their scores as they are."""
    scores = softmax(w[name + "gate.weight"] @ x)
    chosen = sorted(range(EXPERTS), key=lambda e: -scores[e].item())[:TOP_K]
    y = mlp(w, name + "shared_expert.", x, slice(16)) + mlp(w, name + "shared_expert.", x, slice(16, 32))
    for e in chosen:
        gate, up = (w[name + "experts.gate_up_proj"][e] @ x).chunk(2)
        y = y + scores[e] * (w[name + "experts.down_proj"][e] @ (silu(gate) * up))
    return y, scores, chosen


def row_losses(w: dict, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    """Cross-entropies of one row, and the sum over its layers of sum_i f_i P_i (eq. 12 to 14)."""
    xs, balance = [w["model.embed_tokens.weight"][i] for i in ids], torch.zeros(())
    for layer in range(3):
        name = f"model.layers.{layer}."
        projections = (w[name + f"self_attn.{p}_proj.weight"] for p in "qkv")
        mixed = attention([rms_norm(x, w[name + "input_layernorm.weight"]) for x in xs], *projections, 4, 2)
        xs = [x + w[name + "self_attn.o_proj.weight"] @ m for x, m in zip(xs, mixed)]
        normed = [rms_norm(x, w[name + "post_attention_layernorm.weight"]) for x in xs]
        if layer == 0:
            xs = [x + mlp(w, name + "mlp.", n) for x, n in zip(xs, normed)]
            continue
        outputs = [mixture(w, name + "mlp.", n) for n in normed]
        xs = [x + y for x, (y, _, _) in zip(xs, outputs)]
        for e in range(EXPERTS):
            frequency = EXPERTS / (TOP_K * len(ids)) * sum(e in chosen for _, _, chosen in outputs)
            balance = balance + frequency * torch.stack([scores[e] for _, scores, _ in outputs]).mean()
    xs = [rms_norm(x, w["model.norm.weight"]) for x in xs]
    logits = [w["lm_head.weight"] @ x for x in xs[:-1]]
    return [torch.logsumexp(scores, 0) - scores[target] for scores, target in zip(logits, ids[1:])], balance


def test_loss_and_gradients():
    model = build()
    w = double(model)
    entropies, balances = zip(*(row_losses(w, row) for row in X.tolist()))
    expected = torch.stack([value for row in entropies for value in row]).mean() + ALPHA * torch.stack(balances).mean()
    expected.backward()
    loss = model(X, labels=X).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)  # cross-entropy is float32
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=2e-6, rtol=1e-5, msg=name)


def test_which_layers_are_sparse():
    layers = DeepseekMoeConfig(num_hidden_layers=6, first_k_dense_replace=2, moe_layer_freq=2).block_pattern
    assert layers == ["dense", "dense", "sparse", "dense", "sparse", "dense"]
    with pytest.raises(ValueError, match="moe_layer_freq=0 must be 1"):
        DeepseekMoeConfig(moe_layer_freq=0)
