"""Lightning attention against a float64 loop over its formula, and against Transformers' MiniMax."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from hf_moe import HfMoeConfig
from hf_moe.modeling.mixers.lightning_attention import SLOPES, decay_slopes
from hf_moe.modeling.packing import Rows

sys.path.insert(0, str(Path(__file__).parent))
import naive
from recurrences import TIME, build, check_rows, compare, hidden, rotation, run

MINIMAX = {"type": "lightning_attention"}
RING = {
    "type": "lightning_attention",
    "slopes": "ring",
    "scaled": True,
    "qk_norm": True,
    "partial_rotary_factor": 0.5,
    "group_norm_size": 2,
}
VARIANTS = {
    "minimax": MINIMAX,
    "ring": RING,
    "fla": {**MINIMAX, "slopes": "fla", "scaled": True},
    "bare": {**MINIMAX, "silu": False, "gated": False, "group_norm_size": 4},
    "whole-rotary": {**MINIMAX, "partial_rotary_factor": 1.0},
}
HEADS, HEAD_DIM, LAYER, LAYERS = 6, 4, 1, 3  # six heads: ALiBi's slopes for no power of two


def alibi(heads: int) -> list[float]:
    """2^(-8 h / H), and for other head counts those of the next lower power, then every other one of twice that."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return alibi(power) + alibi(2 * power)[0::2][: heads - power]


def slopes_of(convention: str, heads: int, layer: int, layers: int) -> list[float]:
    if convention == "minimax":
        return [a * (1 - layer / (layers - 1) + 1e-5) for a in alibi(heads)]
    if convention == "ring":
        return [a * (1 - (layer - 1) / (layers - 1) + 1e-5) for a in alibi(heads)]
    return [8 / heads * (1 - layer / layers) * h for h in range(heads)]


@pytest.mark.parametrize("convention", SLOPES)
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 16, 20, 64])
def test_slopes(convention, heads):
    for layer in range(4):
        expected = torch.tensor(slopes_of(convention, heads, layer, 4))
        torch.testing.assert_close(decay_slopes(convention, heads, layer, 4, torch.device("cpu")), expected)


def test_one_layer_has_finite_slopes():
    assert all(decay_slopes(kind, 4, 0, 1, torch.device("cpu")).isfinite().all() for kind in SLOPES)


def reference(spec: dict):
    """o_t = sum_j exp(-s (t - j)) (q_t . k_j) v_j per head, y = W_o (sigmoid(W_g x) o norm(o)), token by token."""
    options = {"slopes": "minimax", "silu": True, "scaled": False, "qk_norm": False, "gated": True, **spec}
    act = naive.silu if options["silu"] else lambda x: x
    turned = int(HEAD_DIM * options.get("partial_rotary_factor", 0.0))
    slopes = slopes_of(options["slopes"], HEADS, LAYER, LAYERS)

    def turn(x: Tensor, position: int) -> Tensor:
        return torch.cat([naive.rotate(x[:turned], position), x[turned:]]) if turned else x

    def normed(w: naive.Weights, name: str, x: Tensor) -> Tensor:
        return naive.rms_norm(x, w[f"{name}_norm.weight"]) if options["qk_norm"] else x

    def run_one(w: naive.Weights, xs: list[Tensor]) -> list[Tensor]:
        heads = []
        for h in range(HEADS):
            q, k, v = ([act(w[f"{n}_proj.weight"][h * HEAD_DIM : (h + 1) * HEAD_DIM] @ x) for x in xs] for n in "qkv")
            q = [turn(normed(w, "q", x), t) / (HEAD_DIM**0.5 if options["scaled"] else 1) for t, x in enumerate(q)]
            k = [turn(normed(w, "k", x), t) for t, x in enumerate(k)]
            heads.append(
                [
                    sum(math.exp(-slopes[h] * (t - j)) * (q[t] @ k[j]) * v[j] for j in range(t + 1))
                    for t in range(len(xs))
                ]
            )
        outputs = []
        for x, parts in zip(xs, zip(*heads)):
            o, groups = torch.cat(parts), options.get("group_norm_size", 1)
            weights = w["norm.weight"].chunk(groups)
            o = torch.cat([naive.rms_norm(part, weight) for part, weight in zip(o.chunk(groups), weights)])
            if options["gated"]:
                o = naive.sigmoid(w["g_proj.weight"] @ x) * o
            outputs.append(w["o_proj.weight"] @ o)
        return outputs

    return run_one


def tiny(variant: str, **sizes) -> tuple[torch.nn.Module, tuple | None]:
    """The mixer, and the rotary table it would be given."""
    sizes = {"num_attention_heads": HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": LAYERS, **sizes}
    mixer = build(VARIANTS[variant], LAYER, **sizes)
    factor = VARIANTS[variant].get("partial_rotary_factor")
    return mixer, rotation(TIME, int(HEAD_DIM * factor)) if factor else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_formula(variant):
    mixer, table = tiny(variant)
    # Transformers' norms compute in float32, and slopes are float32: that is the precision here
    compare(mixer, reference(VARIANTS[variant]), 2e-5, Rows(position_embeddings=table))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_cut_of_the_rows(variant):
    mixer, table = tiny(variant)
    check_rows(mixer, 1e-5, table)


def test_partial_rotation_has_the_frequencies_of_the_rotated_part():
    """As in Ring's code; the model's own table is for whole heads."""
    mixer, table = tiny("ring")
    x = hidden(mixer)
    positions = torch.arange(TIME)[None]
    ours, *_ = mixer(x, rotation(TIME, HEAD_DIM), position_ids=positions)
    torch.testing.assert_close(ours, run(mixer, x, Rows(position_embeddings=table))[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_equals_transformers_minimax(layer_idx):
    config = MiniMaxConfig(
        hidden_size=16,
        num_attention_heads=4,
        head_dim=8,
        num_hidden_layers=4,
        block_size=5,
        layer_types=["linear_attention"] * 4,
    )
    native = MiniMaxLightningAttention(config, layer_idx)
    mixer = build(MINIMAX, layer_idx, torch.float32, num_attention_heads=4, head_dim=8, num_hidden_layers=4)
    fused = native.qkv_proj.weight.detach().unflatten(0, (4, 3, 8))  # head by head: q, k, v
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        getattr(mixer, name).weight.data = fused[:, number].flatten(0, 1)
    mixer.g_proj.weight, mixer.o_proj.weight = native.output_gate.weight, native.out_proj.weight
    mixer.norm.weight = native.norm.weight
    x = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(mixer, x)[0], native(x, None, None)[0], atol=1e-6, rtol=1e-5)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    ours = run(mixer, x, Rows(mask.bool()))[0]
    torch.testing.assert_close(ours[mask.bool()], native(x, None, mask)[0][mask.bool()], atol=1e-6, rtol=1e-5)


def test_state_is_heads_times_width_squared_in_float32():
    mixer = build(MINIMAX, dtype=torch.bfloat16)
    _, (state,) = run(mixer, hidden(mixer))
    assert state.shape == (1, 4, 4, 4) and state.dtype == torch.float32


@pytest.mark.parametrize(
    "options,message",
    [
        ({"slopes": "alibi"}, "choose from"),
        ({"group_norm_size": 3}, "does not divide the 16 channels"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor=0.3"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build({**MINIMAX, **options})


def test_config_writes_out_the_convention():
    """A checkpoint keeps its slopes whatever the default becomes."""
    config = HfMoeConfig(blocks={"b": {"mixer": MINIMAX, "feed_forward": {"type": "mlp", "intermediate_size": 4}}})
    assert config.blocks["b"]["mixer"]["slopes"] == "minimax"
