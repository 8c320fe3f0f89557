"""Kimi Delta Attention against its recurrence, token by token in float64, and Transformers' two layers of it."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import BailingHybridConfig, KimiLinearConfig
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

sys.path.insert(0, str(Path(__file__).parent))
import delta_nets
import recurrences
from naive import sigmoid

SPEC = {"type": "kimi_delta_attention"}
OPTIONS = {
    "plain": {},
    "bounded": {"gate": "bounded", "low_rank": False},
    "grouped": {"num_heads": 2, "num_value_heads": 4, "key_head_dim": 3, "value_head_dim": 5, "gate_bias": True},
    "turning": {"allow_neg_eigval": True, "gated": False, "gate": "bounded", "lower_bound": -2.0},
}


@pytest.fixture(params=OPTIONS)
def mixer(request):
    return delta_nets.exact(recurrences.build({**SPEC, **OPTIONS[request.param]}))


def projected(mixer, w, name, x):
    """f(x) or g(x)."""
    inner = w[f"{name}_a_proj.weight"] @ x if f"{name}_a_proj.weight" in w else x
    return w[f"{name}_b_proj.weight"] @ inner + w.get(f"{name}_b_proj.bias", 0)


def formula(mixer, w, xs):
    """The formula of the docstring."""
    heads, k = [], mixer.key_head_dim
    for h, (queries, keys, values) in enumerate(delta_nets.inputs(mixer, w, xs)):
        mine, rate = slice(h * k, (h + 1) * k), torch.exp(w["A_log"][h])
        raw = [projected(mixer, w, "f", x)[mine] + w["dt_bias"][mine] for x in xs]
        if mixer.is_bounded:
            decays = [torch.exp(mixer.lower_bound * sigmoid(rate * x)) for x in raw]
        else:
            decays = [torch.exp(-rate * torch.log1p(torch.exp(x))) for x in raw]
        strengths = [(1 + mixer.allow_neg_eigval) * sigmoid(w["b_proj.weight"][h] @ x) for x in xs]
        heads.append(delta_nets.recurrence(queries, keys, values, decays, strengths))
    gates = [sigmoid(projected(mixer, w, "g", x)) for x in xs] if mixer.gated else None
    return delta_nets.outputs(mixer, w, heads, gates)


def test_formula(mixer):
    recurrences.compare(mixer, lambda w, xs: formula(mixer, w, xs))


def test_pieces_padding_packing(mixer):
    recurrences.check_rows(mixer)


def test_gradients_of_packed_rows(mixer):
    delta_nets.check_packed_gradients(mixer)


def test_state_size(mixer):
    delta_nets.check_state_size(mixer)


def test_initial_decays():
    mixer = recurrences.build({**SPEC, "num_heads": 512, "key_head_dim": 1})
    mixer.init_weights(0.02)
    delta_nets.check_initial_decays(mixer, 1.0)


def shared_weights(ours):
    """What both native layers call the same."""
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")
    convolution = torch.cat([ours.get_parameter(f"{name}_conv1d.weight") for name in "qkv"])
    return {f"{n}.weight": ours.get_parameter(f"{n}.weight") for n in names} | {"conv1d.weight": convolution}


def check_equal(ours, native, weights):
    native.load_state_dict(weights)
    inputs = recurrences.hidden(ours, time=70, rows=2)
    expected = native(inputs)
    torch.testing.assert_close(recurrences.run(ours, inputs)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
def test_equals_kimi_linear():
    ours = recurrences.build({**SPEC, "num_heads": 2, "key_head_dim": 8}, dtype=torch.float32)
    config = KimiLinearConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_heads=2,
        linear_head_dim=8,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        rms_norm_eps=1e-6,
    )
    weights = shared_weights(ours) | {
        "forget_gate.A_log": ours.A_log.view(1, 1, 2, 1),
        "forget_gate.dt_bias": ours.dt_bias,
        "forget_gate.f_a_proj.weight": ours.f_a_proj.weight,
        "forget_gate.f_b_proj.weight": ours.f_b_proj.weight,
        "g_a_proj.weight": ours.g_a_proj.weight,
        "g_b_proj.weight": ours.g_b_proj.weight,
    }
    check_equal(ours, KimiLinearDeltaAttention(config, 0), weights)


@torch.no_grad()
@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_equals_bailing_hybrid(gate):
    spec = {**SPEC, "num_heads": 2, "key_head_dim": 8, "gate": gate, "low_rank": False}
    ours = recurrences.build(spec, dtype=torch.float32)
    config = BailingHybridConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_heads=2,
        linear_head_dim=8,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        kda_safe_gate=gate == "bounded",
        kda_lower_bound=-5.0,
        rms_norm_eps=1e-6,
    )
    weights = shared_weights(ours) | {
        "forget_gate.A_log": ours.A_log,
        "forget_gate.dt_bias": ours.dt_bias,
        "forget_gate.f_proj.weight": ours.f_b_proj.weight,
        "g_proj.weight": ours.g_b_proj.weight,
    }
    check_equal(ours, BailingHybridDeltaAttention(config, 0), weights)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_heads": 3, "num_value_heads": 4}, "num_value_heads=4 must be a multiple of num_heads=3"),
        ({"gate": "sigmoid"}, "gate='sigmoid' is unknown; choose from"),
        ({"lower_bound": 1.0}, "lower_bound=1.0 must be negative"),
        ({"gated": False, "gate_bias": True}, "gate_bias=True is a bias of the output gate"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        recurrences.build({**SPEC, **options})
