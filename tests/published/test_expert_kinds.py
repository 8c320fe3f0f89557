"""Experts of every kind against float64 loops over tokens and slots, outputs and gradients; and what packing keeps."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_moe
from hf_moe import EXPERTS, HfMoeForCausalLM
from hf_moe.modeling.ops.ternary import absmax_rounded, pack_codes, straight_through, ternary_codes, unpack_codes
from hf_moe.modeling.ops.used_slots import run_used_slots
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

TOKENS, WIDTH, HIDDEN, COUNT = 7, 8, 4, 4  # grouped_mm wants rows of 16 bytes
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp-biases": {"activation": "gelu", "bias": True},
    "feature_modulated": {"adaptor_size": 3},
    "ternary": {},
    "ternary-plain": {"activation_bits": None},
    "compressed": {"num_main_experts": 1},
    "compressed-additive": {"num_main_experts": 2, "modulation": "additive"},
}


def build(
    name: str, implementation: str = "batched_mm", dtype: torch.dtype = torch.float64, **more
) -> torch.nn.Module:
    """Experts alone, with weights large enough for every one of them to matter."""
    config = SimpleNamespace(hidden_size=WIDTH, hidden_act="silu", _experts_implementation=implementation)
    torch.manual_seed(0)
    options = {"intermediate_size": HIDDEN, **OPTIONS[name], **more}
    experts = EXPERTS[name.split("-")[0]](config, 0, COUNT, **options)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return experts.to(dtype)


def routing(slots: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, D), different experts for each (N, K), positive weights (N, K)."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(TOKENS, WIDTH, generator=random, dtype=torch.float64)
    indices = torch.rand(TOKENS, COUNT, generator=random).argsort(-1)[:, :slots]
    weights = torch.rand(TOKENS, slots, generator=random, dtype=torch.float64) + 0.1
    return tokens.to(dtype), indices, weights.to(dtype)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(w: naive.Weights, x: Tensor, chosen: list[int], weights: Tensor, options: dict) -> Tensor:
    """sum_k w_k (W_down act(W_up x + b) + b')"""
    y = torch.zeros_like(x)
    for k, e in enumerate(chosen):
        hidden = w["up_proj"][e] @ x
        hidden = gelu(hidden + w["up_proj_bias"][e]) if options.get("bias") else hidden * (hidden > 0)
        out = w["down_proj"][e] @ hidden
        y = y + weights[k] * (out + w["down_proj_bias"][e] if options.get("bias") else out)
    return y


def feature_modulated(w: naive.Weights, x: Tensor, chosen: list[int], weights: Tensor, options: dict) -> Tensor:
    """A_2 gelu(A_1 sum_k w_k ((S b + s) * b + T b + t) + a_1) + a_2"""

    def linear(name: str, v: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    b = gelu(linear("gate_proj", x)) * linear("up_proj", x)
    mixed = torch.zeros_like(b)
    for k, e in enumerate(chosen):
        scale = w["modulation_proj"][e][:HIDDEN] @ b + w["modulation_bias"][e][:HIDDEN]
        shift = w["modulation_proj"][e][HIDDEN:] @ b + w["modulation_bias"][e][HIDDEN:]
        mixed = mixed + weights[k] * (scale * b + shift)
    return linear("adaptor_out_proj", gelu(linear("adaptor_in_proj", mixed)))


def ternary(w: naive.Weights, x: Tensor, chosen: list[int], weights: Tensor, options: dict) -> Tensor:
    """SwiGLU of matrices whose entries are -1, 0 or 1 times mean |W|, and of vectors in steps of max |x| / 127."""

    def rounded_matrix(matrix: Tensor) -> Tensor:
        scale = matrix.abs().mean().item()
        rows = [[round(max(-1.0, min(1.0, v.item() / scale))) * scale for v in row] for row in matrix]
        return matrix + (torch.tensor(rows, dtype=torch.float64) - matrix).detach()

    def rounded_vector(v: Tensor) -> Tensor:
        if not options.get("activation_bits", 8):
            return v
        step = max(abs(entry.item()) for entry in v) / 127
        steps = torch.tensor([round(entry.item() / step) * step for entry in v], dtype=torch.float64)
        return v + (steps - v).detach()

    y = torch.zeros_like(x)
    for k, e in enumerate(chosen):
        gate, up = (rounded_matrix(w["gate_up_proj"][e][part]) for part in (slice(0, HIDDEN), slice(HIDDEN, None)))
        hidden = naive.silu(gate @ rounded_vector(x)) * (up @ rounded_vector(x))
        y = y + weights[k] * (rounded_matrix(w["down_proj"][e]) @ rounded_vector(hidden))
    return y


def compressed(w: naive.Weights, x: Tensor, chosen: list[int], weights: Tensor, options: dict) -> Tensor:
    """The main experts read x times what the vectors of the others add up to."""
    order = naive.best(weights, len(chosen))
    main, others = order[: options["num_main_experts"]], order[options["num_main_experts"] :]
    if options.get("modulation") == "additive":
        factor = 1 + sum(weights[k] * w["modulation"][chosen[k]] for k in others)
    else:
        total = sum(weights[k] for k in others)
        factor = sum(weights[k] / total * w["modulation"][chosen[k]] for k in others) if others else 1
    y = torch.zeros_like(x)
    for k in main:
        gate_up, down = w["gate_up_proj"][chosen[k]], w["down_proj"][chosen[k]]
        y = y + weights[k] * naive.swiglu(x * factor, gate_up[:HIDDEN], gate_up[HIDDEN:], down)
    return y


REFERENCES = {
    "mlp": mlp, "feature_modulated": feature_modulated, "ternary": ternary, "compressed": compressed,
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_gradients_follow_the_formula(name, implementation):
    experts = build(name, implementation)
    tokens, indices, weights = routing()
    tokens.requires_grad_(), weights.requires_grad_()
    output = experts(tokens, indices, weights)
    x, g = (leaf.detach().clone().requires_grad_() for leaf in (tokens, weights))
    w = naive.double(experts)
    reference = REFERENCES[name.split("-")[0]]
    expected = torch.stack([reference(w, x[n], indices[n].tolist(), g[n], OPTIONS[name]) for n in range(TOKENS)])
    torch.testing.assert_close(output, expected)
    probe = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(tokens.grad, x.grad)
    torch.testing.assert_close(weights.grad, g.grad)
    for key, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.grad, w[key].grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", OPTIONS)
def test_grouped_matrix_products_agree(name):
    more = {"activation_bits": None} if name == "ternary" else {}  # a rounding may turn over with the order of a sum
    expected = build(name, "eager", torch.float32, **more)(*routing(dtype=torch.float32))
    output = build(name, "grouped_mm", torch.float32, **more)(*routing(dtype=torch.float32))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["mlp", "mlp-biases", "ternary-plain"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_listed_rows_are_the_used_slots(name, implementation):
    experts = build(name, implementation, torch.float32)
    tokens, indices, weights = routing(dtype=torch.float32)
    weights = weights * (torch.arange(3) <= torch.arange(TOKENS)[:, None] % 3)
    token, slot = weights.nonzero(as_tuple=True)
    listed = experts(tokens, indices[token, slot, None], weights[token, slot, None], token)
    torch.testing.assert_close(listed, experts(tokens, indices, weights))


def test_identity_experts_return_their_token():
    tokens, indices, weights = routing()
    experts = EXPERTS["identity"](SimpleNamespace(hidden_size=WIDTH), 0, COUNT)
    assert not list(experts.parameters())
    torch.testing.assert_close(experts(tokens, indices, weights), sum(weights[:, k, None] * tokens for k in range(3)))
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(experts(tokens, indices, weights), tokens)


# --- compressed ---


@pytest.mark.parametrize("modulation", ["normalized", "additive"])
def test_compressed_experts_start_as_their_main_experts_alone(modulation):
    experts = build("compressed", num_main_experts=2, modulation=modulation)
    experts.init_weights(0.5)
    tokens, indices, weights = routing()
    kept = weights >= weights.topk(2, dim=-1).values[:, -1:]
    plain = EXPERTS["swiglu"](experts.config, 0, COUNT, intermediate_size=HIDDEN).double()
    plain.load_state_dict({key: value for key, value in experts.state_dict().items() if key != "modulation"})
    torch.testing.assert_close(experts(tokens, indices, weights), plain(tokens, indices, weights * kept))


def test_a_token_without_auxiliary_experts_is_not_modulated():
    experts = build("compressed", num_main_experts=2)
    tokens, indices, weights = routing()
    weights = torch.cat([weights[:, :2], torch.zeros(TOKENS, 1)], -1).double().requires_grad_()
    plain = EXPERTS["swiglu"](experts.config, 0, COUNT, intermediate_size=HIDDEN).double()
    plain.load_state_dict({key: value for key, value in experts.state_dict().items() if key != "modulation"})
    output = experts(tokens, indices, weights)
    torch.testing.assert_close(output, plain(tokens, indices, weights))
    output.sum().backward()
    assert weights.grad.isfinite().all() and not experts.modulation.grad.any()


@pytest.mark.parametrize("name", ["compressed", "feature_modulated"])
def test_experts_that_depend_on_each_other_are_run_together(name):
    """Idle slots and experts that compute nothing take no part, neither as main nor as auxiliary experts."""
    experts = build(name)
    tokens, indices, weights = routing()
    extended, heavier = torch.cat([indices, indices[:, :1], indices[:, :1] + COUNT], -1), torch.ones(TOKENS, 1)
    more = torch.cat([weights, 0 * weights[:, :1], heavier], -1)
    more = more.where(extended < COUNT, 0)  # `moe` gives zero experts no weight here
    torch.testing.assert_close(
        run_used_slots(experts, tokens, extended, more, COUNT), experts(tokens, indices, weights)
    )


# --- ternary ---


def test_unpacking_returns_what_was_packed():
    for size in range(1, 10):
        codes = torch.randint(-1, 2, (3, 5, size), generator=torch.Generator().manual_seed(size)).float()
        packed = pack_codes(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (3, 5, math.ceil(size / 4))
        assert torch.equal(unpack_codes(packed, size, torch.float32), codes)
    # the first code in the lowest bits: -1, 0, 1, -1 are 0, 1, 2, 0
    assert pack_codes(torch.tensor([-1.0, 0, 1, -1])).tolist() == [0 + 1 * 4 + 2 * 16 + 0 * 64]


def test_ternary_codes_use_the_mean_magnitude_of_each_matrix():
    weight = torch.tensor([[[0.1, -0.6], [1.5, 0.2]], [[0.0, 0.0], [0.0, 0.0]]])
    codes, scale = ternary_codes(weight)
    assert codes.tolist() == [[[0, -1], [1, 0]], [[0, 0], [0, 0]]]
    torch.testing.assert_close(scale[0].squeeze(), torch.tensor(0.6))
    values = torch.randn(50, 9)
    steps = absmax_rounded(values, 8) / (values.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.abs().max().round() == 127


def test_straight_through_keeps_the_rounded_value_to_the_last_bit():
    value = torch.randn(1000, requires_grad=True)
    rounded = value.detach().round() * 0.1
    output = straight_through(value, rounded)
    assert torch.equal(output, rounded)
    assert torch.equal(torch.autograd.grad(output.sum(), value)[0], torch.ones(1000))


def test_ternary_weights_learn_through_their_rounding():
    """100 steps towards an output that is off by one: weights move between -1, 0 and 1."""
    tokens, indices, weights = routing(dtype=torch.float32)
    target = build("ternary", dtype=torch.float32)(tokens, indices, weights).detach() + 1
    experts = build("ternary", dtype=torch.float32)
    before = ternary_codes(experts.gate_up_proj)[0]
    optimizer, losses = torch.optim.Adam(experts.parameters(), lr=1e-2), []
    for _ in range(100):
        loss = (experts(tokens, indices, weights) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.2 * losses[0], (losses[0], min(losses))
    assert (ternary_codes(experts.gate_up_proj)[0] != before).any()


def tiny_ternary(**options) -> hf_moe.HfMoeConfig:
    experts = {"type": "ternary", "intermediate_size": 10, **options}
    feed_forward = {"type": "moe", "num_experts": 4, "router": {"type": "top_k"}, "experts": experts}
    return tiny_config("hf_moe", blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_compute_what_they_were_packed_from(dtype, tmp_path):
    torch.manual_seed(0)
    trained = HfMoeForCausalLM(tiny_ternary()).to(dtype).eval()
    packed = HfMoeForCausalLM(tiny_ternary(packed=True)).to(dtype).eval()
    assert not packed.load_state_dict(trained.state_dict(), strict=False).missing_keys
    for model in (trained, packed):
        model.set_experts_implementation("batched_mm")  # rows of 10 are odd to grouped_mm
    ids = torch.randint(1, 200, (2, 9))
    with torch.no_grad():
        expected = trained(ids).logits
        assert torch.equal(packed(ids).logits, expected)
        packed.save_pretrained(tmp_path)
        again = HfMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype, experts_implementation="batched_mm")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), packed.state_dict().values()))
    experts = again.model.layers[0].mlp.ternary_experts
    assert experts.gate_up_codes.dtype == torch.uint8 and experts.down_scale.dtype == torch.float32
    assert not list(experts.parameters())
    weights = sum(p.numel() for p in trained.model.layers[0].mlp.ternary_experts.parameters())
    stored = sum(b.numel() * b.element_size() for b in experts.buffers())
    padding = 4 * trained.config.hidden_size * (3 * 4 - 10) / 4  # rows of 10 take 3 bytes
    assert stored == weights / 4 + padding + 4 * 3 * 4  # and three scales of 4 bytes per expert


def test_packing_reads_checkpoints_of_one_tensor_per_expert():
    """What Trainer resumes from: the packed module stacks, then packs."""
    experts, packed = build("ternary", dtype=torch.float32), build("ternary", dtype=torch.float32, packed=True)
    files = {}
    for e in range(COUNT):
        files[f"{e}.gate_proj.weight"], files[f"{e}.up_proj.weight"] = experts.gate_up_proj[e].chunk(2)
        files[f"{e}.down_proj.weight"] = experts.down_proj[e]
    packed.load_state_dict(files)
    for name in ("gate_up", "down"):
        weight = experts.ternary_weight(name, torch.float32)
        assert torch.equal(packed.ternary_weight(name, torch.float32), weight)
        assert len(weight[0].abs().unique()) <= (3 if name == "gate_up" else 2)


# --- bad input ---


@pytest.mark.parametrize(
    "experts,message",
    [
        ({"type": "mlp", "intermediate_size": 8, "activation": "swoosh"}, "Unknown activation 'swoosh'; choose from"),
        (
            {"type": "feature_modulated", "intermediate_size": 8, "adaptor_size": 8, "activation": "swoosh"},
            "Unknown activation 'swoosh'; choose from",
        ),
        ({"type": "ternary", "intermediate_size": 8, "activation_bits": 16}, "activation_bits=16 must be 2 to 8"),
        ({"type": "compressed", "intermediate_size": 8}, r"'compressed' needs \['num_main_experts'\]"),
        ({"type": "compressed", "intermediate_size": 8, "num_main_experts": 5}, "num_main_experts=5; .* 1 to 4"),
        (
            {"type": "compressed", "intermediate_size": 8, "num_main_experts": 1, "modulation": "both"},
            r"modulation='both' is unknown; choose from \['normalized', 'additive'\]",
        ),
    ],
)
def test_bad_options_are_refused(experts, message):
    feed_forward = {"type": "moe", "num_experts": 4, "router": {"type": "top_k"}, "experts": experts}
    with pytest.raises(ValueError, match=message):
        tiny_config("hf_moe", blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}})
