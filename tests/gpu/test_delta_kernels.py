"""flash-linear-attention's kernels of the delta rule against their twin in torch, on a GPU, and the layers on both."""

import importlib.util
import logging
import warnings

import pytest
import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.ops import delta_rule as ops
from hf_moe.modeling.ops import kernels
from hf_moe.modeling.packing import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("fla") is None, reason="needs CUDA and fla"
    ),
]
# relative to the norm of what is compared; float32 products of the kernels may run as TF32
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
B, T, H = 2, 333, 4
SIZES = {"square": (64, 64, 1), "grouped": (128, 64, 2), "wide": (64, 128, 1)}  # K, V, value heads per key head
LAYOUTS = ["plain", "padded", "packed", "both"]
KINDS = ["per_head", "per_channel"]


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "") -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def rows_of(layout: str) -> Rows:
    """Padding on both sides and in the middle; sequences that start on and off the edge of a chunk."""
    columns = torch.arange(T, device="cuda")
    mask = torch.stack([columns >= 77, (columns % 7 != 3) & (columns < T - 20)])
    starts = torch.zeros(B, T, dtype=torch.long, device="cuda")
    starts[0, [1, 64, 200]] = 1
    starts[1, [130, 131]] = 1
    segments = starts.cumsum(1)
    return Rows(mask if layout in ("padded", "both") else None, segments if layout in ("packed", "both") else None)


def inputs(kind: str, size: str, dtype: torch.dtype, time: int = T) -> dict[str, torch.Tensor]:
    """What the rule is given; the state is not zero."""
    key_width, value_width, groups = SIZES[size]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, sample=torch.randn) -> torch.Tensor:
        return sample(shape, generator=generator, device="cuda")

    channels = [key_width] if kind == "per_channel" else []
    return {
        "query": random(B, time, H // groups, key_width).to(dtype),
        "key": random(B, time, H // groups, key_width).to(dtype),
        "value": random(B, time, H, value_width).to(dtype),
        "log_decay": -0.3 * random(B, time, H, *channels, sample=torch.rand),
        "beta": random(B, time, H, sample=torch.rand),
        "state": random(B, H, key_width, value_width),
    }


def results(tensors: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Output, state and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
    output, state = ops.delta_rule(*leaves, rows)
    real = output if rows.mask is None else output * rows.mask[..., None, None]
    generator = torch.Generator("cuda").manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, device="cuda")).sum() for x in (real, state))
    gradients = torch.autograd.grad(loss, leaves)
    return {"output": real.detach(), "last state": state.detach(), **dict(zip(tensors, gradients))}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Warnings of fla's own imports are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("fla.ops.kda")
        importlib.import_module("fla.ops.gated_delta_rule")


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The kernels that ran."""
    names = []

    def run(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        return kernels.run_fla(kernel, *args, **kwargs)

    monkeypatch.setattr(ops, "run_fla", run)
    return names


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_twin(kind, size, layout, dtype, runs):
    """The twin runs in float64, on the inputs as they were rounded for the kernel."""
    tensors, rows = inputs(kind, size, dtype), rows_of(layout)
    actual = results(tensors, rows)
    assert runs == ["chunk_kda" if kind == "per_channel" else "chunk_gated_delta_rule"]
    expected = results({name: x.double() for name, x in tensors.items()}, rows)
    assert len(runs) == 1
    assert actual["output"].dtype == dtype and actual["last state"].dtype == torch.float32
    for name in expected:
        near(actual[name], expected[name], TOLERANCE[dtype], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_twin_on_a_gpu(kind, layout, monkeypatch):
    """Where fla is missing the twin runs, in float32 without TF32."""
    monkeypatch.setattr(kernels, "FLA_IS_INSTALLED", False)
    tensors, rows = inputs(kind, "square", torch.float32), rows_of(layout)
    expected = results({name: x.double() for name, x in tensors.items()}, rows)
    for name, actual in results(tensors, rows).items():
        near(actual, expected[name], 1e-5, name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_decode(kind, size, dtype, runs):
    """A prompt in one call, then token by token, one of them padding, against the twin's one call."""
    tensors = inputs(kind, size, dtype, time=75)
    mask = torch.ones(B, 75, dtype=torch.bool, device="cuda")
    mask[1, 72] = False
    expected, last = ops.delta_rule(*(x.double() for x in tensors.values()), Rows(mask))
    *inputs_, state = tensors.values()
    outputs = []
    for start, stop in ((0, 70), *((t, t + 1) for t in range(70, 75))):
        columns = slice(start, stop)
        output, state = ops.delta_rule(*(x[:, columns] for x in inputs_), state, Rows(mask[:, columns]))
        outputs.append(output)
    suffix = "kda" if kind == "per_channel" else "gated_delta_rule"
    assert runs == [f"chunk_{suffix}", *[f"fused_recurrent_{suffix}"] * 5]
    near(torch.cat(outputs, 1) * mask[..., None, None], expected * mask[..., None, None], TOLERANCE[dtype], "output")
    near(state, last, TOLERANCE[dtype], "state")


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_with_gradients(kind, runs):
    """The kernels for single tokens have no backward pass: the twin runs."""
    tensors = inputs(kind, "square", torch.float32, time=1)
    expected = results({name: x.double() for name, x in tensors.items()}, Rows())
    for name, actual in results(tensors, Rows()).items():
        near(actual, expected[name], 1e-5, name)
    assert not runs


MIXERS = {
    "gated_delta_net": {"num_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64},
    "kimi_delta_attention": {"num_heads": 2, "key_head_dim": 64},
    "kimi_delta_attention-bounded": {"num_heads": 2, "key_head_dim": 64, "gate": "bounded", "low_rank": False},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_model_gives_the_same_on_both_devices(name, packed, caplog):
    """A whole model in float32: logits and gradients, plain and with packed sequences, and what it says it runs on."""
    spec = {"type": name.partition("-")[0], **MIXERS[name]}
    feed_forward = {"type": "mlp", "intermediate_size": 64}
    torch.manual_seed(0)
    config = HfMoeConfig(
        blocks={"b": {"mixer": spec, "feed_forward": feed_forward}},
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = HfMoeForCausalLM(config)
    tokens = torch.randint(1, 97, (2, 130), generator=torch.Generator().manual_seed(0))
    options = {"position_ids": torch.arange(130)[None].expand(2, -1) % 77} if packed else {}

    def step(device):
        model.zero_grad()
        model.to(device)
        logits = model(tokens.to(device), use_cache=False, **{n: x.to(device) for n, x in options.items()}).logits
        logits.square().mean().backward()
        return logits.detach().cpu(), {n: p.grad.cpu().clone() for n, p in model.named_parameters()}

    expected, their_gradients = step("cpu")
    kernels.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "hf_moe"):
        logits, gradients = step("cuda")
    assert any("runs on fla.ops" in message for message in caplog.messages)
    near(logits, expected, 2e-2, "logits")
    for parameter, gradient in gradients.items():
        near(gradient, their_gradients[parameter], 5e-2, parameter)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_generates_what_the_twin_generates(name, monkeypatch):
    """Greedy tokens of a float32 model with a cache, two prompts of different length."""
    spec = {"type": name.partition("-")[0], **MIXERS[name]}
    torch.manual_seed(0)
    config = HfMoeConfig(
        blocks={"b": {"mixer": spec, "feed_forward": {"type": "mlp", "intermediate_size": 64}}},
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = HfMoeForCausalLM(config).eval().cuda()
    tokens = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    fast = model.generate(tokens * mask, **options)
    monkeypatch.setattr(kernels, "FLA_IS_INSTALLED", False)
    slow = model.generate(tokens * mask, **options)
    near(fast.logits[0], slow.logits[0], 2e-2, "logits")
    # rounding may decide a near tie: most tokens are the same
    assert (fast.sequences == slow.sequences).float().mean() > 0.9
