"""flash-linear-attention's kernels against their twins in torch, on a GPU: outputs, states and gradients."""

import importlib.util
import logging

import pytest
import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.ops import kernels
from hf_moe.modeling.ops.linear_attention import linear_attention
from hf_moe.modeling.packing import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("fla") is None, reason="needs CUDA and fla"
    ),
]
# relative to the norm of what is compared; float32 products of the kernels may run as TF32
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
B, T, H = 2, 333, 4
SIZES = {"square": (64, 64), "based": (153, 65), "mamba": (128, 64)}
DECAYS = ["none", "constant", "token"]
LAYOUTS = ["plain", "padded", "packed", "both"]


def near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str = "") -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def rows_of(layout: str) -> Rows:
    """Padding on both sides and in the middle; sequences that start on and off the edge of a chunk."""
    columns = torch.arange(T, device="cuda")
    mask = torch.stack([columns >= 77, (columns % 7 != 3) & (columns < T - 20)])
    starts = torch.zeros(B, T, dtype=torch.long, device="cuda")
    starts[0, [1, 64, 200]] = 1
    starts[1, [130, 131]] = 1
    segments = starts.cumsum(1)
    return Rows(mask if layout in ("padded", "both") else None, segments if layout in ("packed", "both") else None)


def inputs(size: str, decay: str, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Queries, keys, values, an initial state that is not zero, and log decays."""
    key_width, value_width = SIZES[size]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    gates = {"none": None, "constant": (H,), "token": (B, T, H)}[decay]
    scale = key_width**-0.5
    return [
        (normal(B, T, H, key_width) * scale).to(dtype),
        normal(B, T, H, key_width).to(dtype),
        normal(B, T, H, value_width).to(dtype),
        normal(B, H, key_width, value_width),
        gates and -0.2 * torch.rand(gates, generator=generator, device="cuda"),
    ]


def results(tensors: list[torch.Tensor | None], rows: Rows, constant: bool) -> dict[str, torch.Tensor]:
    """Output, state, and the gradients of everything but a constant decay."""
    leaves = [x if x is None else x.detach().clone() for x in tensors]
    names = ["query", "key", "value", "state", *([] if constant or leaves[4] is None else ["log_decay"])]
    for leaf in leaves[: len(names)]:
        leaf.requires_grad_()
    output, state = linear_attention(*leaves[:4], rows, leaves[4])
    real = output if rows.mask is None else output * rows.mask[..., None, None]
    generator = torch.Generator("cuda").manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, device="cuda")).sum() for x in (real, state))
    gradients = torch.autograd.grad(loss, leaves[: len(names)])
    return {"output": real.detach(), "last state": state.detach(), **dict(zip(names, gradients))}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_torch(size, decay, layout, dtype, monkeypatch):
    tensors, rows = inputs(size, decay, dtype), rows_of(layout)
    ours = results(tensors, rows, decay == "constant")
    assert ("fla.ops.simple_gla", "chunk_simple_gla") in kernels.FLA_KERNELS
    monkeypatch.setattr(kernels, "FLA_IS_INSTALLED", False)
    exact = results([x if x is None else x.double() for x in tensors], rows, decay == "constant")
    for name, expected in exact.items():
        near(ours[name], expected, dtype, name)


MIXERS = {
    "based": {"type": "based"},
    "lightning": {"type": "lightning_attention"},
    "ring": {
        "type": "lightning_attention",
        "slopes": "ring",
        "scaled": True,
        "qk_norm": True,
        "partial_rotary_factor": 0.5,
        "group_norm_size": 4,
    },
    "mamba2": {"type": "mamba2", "state_size": 64, "num_groups": 2},
}


@pytest.fixture(params=MIXERS)
def model(request):
    torch.manual_seed(0)
    block = {"mixer": MIXERS[request.param], "feed_forward": {"type": "mlp", "intermediate_size": 64}}
    config = HfMoeConfig(
        vocab_size=97, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, blocks={"b": block}
    )
    return HfMoeForCausalLM(config).cuda().eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_prefill_on_the_kernel_then_steps_in_torch(model, dtype, monkeypatch, caplog):
    ids = torch.randint(1, 97, (2, 150), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    kernels.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "hf_moe"):
        outputs = model.to(dtype)(ids[:, :140], attention_mask=mask[:, :140], use_cache=True)
        logits = [outputs.logits]
        for t in range(140, 150):
            outputs = model(
                ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=outputs.past_key_values
            )
            logits.append(outputs.logits)
    name = type(model.model.layers[0].self_attn).__name__
    lines = [record.message for record in caplog.records if record.name == "hf_moe"]
    assert lines == [f"{name} runs on fla.ops.simple_gla.chunk_simple_gla."]
    monkeypatch.setattr(kernels, "FLA_IS_INSTALLED", False)
    expected = model.float()(ids, attention_mask=mask).logits  # the same, rounded weights
    real = mask.bool()
    near(torch.cat(logits, 1)[real], expected[real], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_training_step(model, dtype, monkeypatch):
    """Three sequences in one row, told apart by their positions."""
    ids = torch.randint(1, 97, (1, 210), device="cuda")
    positions = torch.cat([torch.arange(n) for n in (65, 1, 144)])[None].cuda()

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(ids, position_ids=positions, use_cache=False).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    logits, ours = (model.to(dtype), gradients())[1]
    ours = {name: gradient.clone() for name, gradient in ours.items()}
    monkeypatch.setattr(kernels, "FLA_IS_INSTALLED", False)
    model.float()
    expected_logits, expected = gradients()
    near(logits, expected_logits, dtype)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # rounding of activations adds up over two layers
        error = (ours[name].float() - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 5 * TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@torch.no_grad()
def test_autocast_keeps_the_state_in_float32(model):
    ids = torch.randint(1, 97, (1, 100), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model(ids, use_cache=True)
    assert outputs.past_key_values.layers[0].states[0].dtype == torch.float32
    near(outputs.logits, model(ids).logits, torch.bfloat16)
