"""Gated DeltaNet against its recurrence, token by token in float64, and against Transformers' Qwen3-Next layer."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

sys.path.insert(0, str(Path(__file__).parent))
import delta_nets
import recurrences
from naive import sigmoid, silu

SPEC = {"type": "gated_delta_net"}
OPTIONS = {
    "plain": {},
    "grouped": {"num_heads": 2, "num_value_heads": 4, "key_head_dim": 3, "value_head_dim": 5},
    "turning": {"allow_neg_eigval": True, "gated": False, "conv_kernel_size": 2},
}


@pytest.fixture(params=OPTIONS)
def mixer(request):
    return delta_nets.exact(recurrences.build({**SPEC, **OPTIONS[request.param]}))


def formula(mixer, w, xs):
    """The formula of the docstring."""
    heads = []
    for h, (queries, keys, values) in enumerate(delta_nets.inputs(mixer, w, xs)):
        decays = [
            torch.exp(-torch.exp(w["A_log"][h]) * torch.log1p(torch.exp(w["a_proj.weight"][h] @ x + w["dt_bias"][h])))
            for x in xs
        ]
        strengths = [(1 + mixer.allow_neg_eigval) * sigmoid(w["b_proj.weight"][h] @ x) for x in xs]
        heads.append(delta_nets.recurrence(queries, keys, values, decays, strengths))
    gates = [silu(w["g_proj.weight"] @ x) for x in xs] if mixer.gated else None
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
    mixer = recurrences.build({**SPEC, "num_heads": 256, "num_value_heads": 512, "key_head_dim": 1})
    mixer.init_weights(0.02)
    delta_nets.check_initial_decays(mixer, 0.01)


def test_decay_parameters_are_marked_when_they_are_loaded():
    mixer = recurrences.build(SPEC)
    mixer.load_state_dict({name: torch.zeros_like(x) for name, x in mixer.state_dict().items()}, assign=True)
    assert mixer.A_log._no_weight_decay and mixer.dt_bias._no_weight_decay


@torch.no_grad()
@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("value_heads", [2, 4])
def test_equals_qwen3_next(value_heads):
    """Qwen3-Next keeps the projections of one key head together; in fla's order they are ours."""
    sizes = {"num_heads": 2, "num_value_heads": value_heads, "key_head_dim": 8, "value_head_dim": 6}
    ours = recurrences.build({**SPEC, **sizes}, dtype=torch.float32)
    config = Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        layer_types=["linear_attention"],
    )
    native = Qwen3NextGatedDeltaNet(config, 0)

    def per_key_head(*names):
        return torch.cat([ours.get_parameter(f"{name}.weight").unflatten(0, (2, -1)) for name in names], 1).flatten(
            0, 1
        )

    native.load_state_dict(
        {
            "in_proj_qkvz.weight": per_key_head("q_proj", "k_proj", "v_proj", "g_proj"),
            "in_proj_ba.weight": per_key_head("b_proj", "a_proj"),
            "conv1d.weight": torch.cat([ours.get_parameter(f"{name}_conv1d.weight") for name in "qkv"]),
            "A_log": ours.A_log,
            "dt_bias": ours.dt_bias,
            "norm.weight": ours.o_norm.weight,
            "out_proj.weight": ours.o_proj.weight,
        }
    )
    inputs = recurrences.hidden(ours, time=70, rows=2)
    expected = native(inputs)
    # theirs has the larger error: a difference of running sums of decays loses digits
    torch.testing.assert_close(recurrences.run(ours, inputs)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_heads": 3, "num_value_heads": 4}, "num_value_heads=4 must be a multiple of num_heads=3"),
        ({"num_value_heads": 2}, "must be a multiple of num_heads=4"),
        ({"key_head_dim": 0}, "key_head_dim=0 must be at least 1"),
        ({"conv_kernel_size": 1}, "conv_kernel_size=1 must be at least 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        recurrences.build({**SPEC, **options})
