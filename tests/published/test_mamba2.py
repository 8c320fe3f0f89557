"""Mamba-2 against a float64 loop over its formula, and against the mixers of Transformers' Mamba-2 and Nemotron-H."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, NemotronHConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from hf_moe.modeling.packing import Rows

sys.path.insert(0, str(Path(__file__).parent))
import naive
from recurrences import build, check_rows, compare, hidden, run

HEADS, HEAD_DIM, STATE = 4, 3, 5
VARIANTS = {
    "plain": {},
    "groups": {"num_groups": 2},
    "biases": {"bias": True, "conv_bias": False},
    "limits": {"min_time_step": 0.3, "max_time_step": 1.2, "num_groups": 4},
}


def spec(variant: str) -> dict:
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "state_size": STATE, "conv_kernel": 3}
    return {"type": "mamba2", **sizes, **VARIANTS[variant]}


def reference(options: dict):
    """Token by token, head by head: the formula at the top of the mixer's file."""
    width, groups = HEADS * HEAD_DIM, options.get("num_groups", 1)
    keys, kernel_size = groups * STATE, options["conv_kernel"]
    lowest, highest = options.get("min_time_step", 0.0), options.get("max_time_step", float("inf"))

    def run_one(w: naive.Weights, xs: list[Tensor]) -> list[Tensor]:
        zero = torch.zeros((), dtype=torch.float64)
        projected = [w["in_proj.weight"] @ x + w.get("in_proj.bias", zero) for x in xs]
        states = [torch.zeros(STATE, HEAD_DIM, dtype=torch.float64) for _ in range(HEADS)]
        outputs = []
        for t in range(len(xs)):
            gate, dt = projected[t][:width], projected[t][-HEADS:]
            mixed = w.get("conv1d.bias", zero)
            for back in range(min(kernel_size, t + 1)):
                mixed = mixed + w["conv1d.weight"][:, 0, kernel_size - 1 - back] * projected[t - back][width:-HEADS]
            mixed = naive.silu(mixed)
            heads = []
            for h in range(HEADS):
                group = h // (HEADS // groups)
                x = mixed[h * HEAD_DIM : (h + 1) * HEAD_DIM]
                b = mixed[width + group * STATE : width + (group + 1) * STATE]
                c = mixed[width + keys + group * STATE : width + keys + (group + 1) * STATE]
                step = torch.log(1 + torch.exp(dt[h] + w["dt_bias"][h]))
                step = torch.clamp(step, lowest, highest)
                decay = torch.exp(-torch.exp(w["A_log"][h]) * step)
                states[h] = decay * states[h] + torch.outer(b, step * x)
                heads.append(c @ states[h] + w["D"][h] * x)
            o = torch.cat(heads) * naive.silu(gate)
            parts = zip(o.chunk(groups), w["norm.weight"].chunk(groups))
            o = torch.cat([naive.rms_norm(part, weight) for part, weight in parts])
            outputs.append(w["out_proj.weight"] @ o + w.get("out_proj.bias", zero))
        return outputs

    return run_one


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_formula(variant):
    options = spec(variant)
    # time steps, decays and Transformers' norm are float32 by design
    compare(build(options), reference(options), 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_cut_of_the_rows(variant):
    check_rows(build(spec(variant)), 1e-5)


def natives(groups: int) -> list[torch.nn.Module]:
    """Transformers' two mixers with 4 heads of 8 over a state of 6."""
    sizes = {"hidden_size": 16, "n_groups": groups, "conv_kernel": 3, "chunk_size": 4, "num_hidden_layers": 1}
    mamba = Mamba2Config(**sizes, num_heads=4, head_dim=8, state_size=6, layer_norm_epsilon=1e-6)
    nemotron = NemotronHConfig(
        **sizes,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=6,
        layers_block_type=["mamba"],
        time_step_min=0.5,
        layer_norm_epsilon=1e-6,
    )
    torch.manual_seed(0)
    return [Mamba2Mixer(mamba, 0).eval(), NemotronHMamba2Mixer(nemotron, 0).eval()]


@pytest.mark.allow_warnings("falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("number", [0, 1], ids=["mamba2", "nemotron_h"])
def test_equals_transformers(number, groups):
    native = natives(groups)[number]
    native.norm.weight.data += 0.3 * torch.randn(32)
    limits = {"min_time_step": native.time_step_limit[0]}
    sizes = {"num_heads": 4, "head_dim": 8, "state_size": 6, "conv_kernel": 3, "num_groups": groups}
    mixer = build({"type": "mamba2", **sizes, **limits}, dtype=torch.float32)
    mixer.load_state_dict(native.state_dict())  # the same names, the same shapes
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(mixer, x)[0], native(x), atol=2e-6, rtol=1e-5)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    ours, theirs = run(mixer, x, Rows(mask.bool()))[0], native(x, attention_mask=mask)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=2e-6, rtol=1e-5)


def test_state_is_heads_times_state_size_times_width():
    mixer = build(spec("groups"), dtype=torch.bfloat16)
    _, (state, conv_state) = run(mixer, hidden(mixer))
    assert state.shape == (1, HEADS, STATE, HEAD_DIM) and state.dtype == torch.float32
    assert conv_state.shape == (1, HEADS * HEAD_DIM + 2 * 2 * STATE, 2) and conv_state.dtype == torch.bfloat16


def test_default_expands_by_two():
    mixer = build({"type": "mamba2", "head_dim": 8})
    assert mixer.num_heads == 4 and mixer.out_proj.weight.shape == (16, 32)


def test_initial_time_steps_are_in_mambas_range():
    mixer = build({"type": "mamba2", "num_heads": 256, "head_dim": 1}, dtype=torch.float32)
    mixer.init_weights(0.02)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 257.0))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_heads": 4, "num_groups": 3}, "num_groups=3 does not divide the 4 heads"),
        ({"head_dim": 5}, "head_dim=5 does not divide 32 channels"),
        ({"head_dim": 8, "min_time_step": 0.2, "max_time_step": 0.1}, "min_time_step < max_time_step"),
        ({"head_dim": 8, "conv_kernel": 0}, "conv_kernel=0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build({"type": "mamba2", **options})
