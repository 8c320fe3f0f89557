"""Time-MoE as published: names, numbers, losses of all horizons, forecasts.

Facts from the paper (https://arxiv.org/abs/2409.16040) and the modeling file of Time-MoE/Time-MoE and its forks.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import rms_norm, rotate, silu
from published_checkpoints import load, random_tensors, saves_back
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe.modeling.forecasting import forecast_loss
from hf_moe.published import TimeMoeConfig, TimeMoeForPrediction

D, HEADS, FFN, EXPERTS, TOP_K, LAYERS, HORIZONS = 8, 2, 16, 4, 2, 2, (1, 3, 8)
GATES = {"gate": EXPERTS, "shared_expert_gate": 1}
CONFIG: dict[str, Any] = {
    "architectures": ["TimeMoeForPrediction"],
    "auto_map": {"AutoModelForCausalLM": "modeling_time_moe.TimeMoeForPrediction"},
    "model_type": "time_moe",
    "input_size": 1,
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_act": "silu",
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "horizon_lengths": list(HORIZONS),
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "router_aux_loss_factor": 0.02,
    "apply_aux_loss": True,
    "use_dense": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def mlp_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_proj.weight": (width, D), f"{name}.up_proj.weight": (width, D)} | {
        f"{name}.down_proj.weight": (D, width)
    }


def shapes(dense: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files."""
    found: dict[str, tuple[int, ...]] = {f"model.embed_layer.{name}_layer.weight": (D, 1) for name in ("emb", "gate")}
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        for name in "qkv":
            found |= {f"{layer}.self_attn.{name}_proj.weight": (D, D), f"{layer}.self_attn.{name}_proj.bias": (D,)}
        found |= {f"{layer}.self_attn.o_proj.weight": (D, D)}
        found |= {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        if dense:
            found |= mlp_shapes(f"{layer}.ffn_layer", FFN)
            continue
        for expert in range(EXPERTS):
            found |= mlp_shapes(f"{layer}.ffn_layer.experts.{expert}", FFN // TOP_K)
        found |= mlp_shapes(f"{layer}.ffn_layer.shared_expert", FFN)
        found |= {
            f"{layer}.ffn_layer.gate.weight": (EXPERTS, D),
            f"{layer}.ffn_layer.shared_expert_gate.weight": (1, D),
        }
    found["model.norm.weight"] = (D,)
    return found | {f"lm_heads.{i}.out_layer.weight": (h, D) for i, h in enumerate(HORIZONS)}


def gated(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return w[f"{name}.down_proj.weight"] @ (
        silu(w[f"{name}.gate_proj.weight"] @ x) * (w[f"{name}.up_proj.weight"] @ x)
    )


def attention(w: dict[str, Tensor], name: str, xs: list[Tensor]) -> list[Tensor]:
    q, k, v = ([w[f"{name}.{c}_proj.weight"] @ x + w[f"{name}.{c}_proj.bias"] for x in xs] for c in "qkv")
    outputs, width = [], D // HEADS
    for t in range(len(xs)):
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            query = rotate(q[t][part], t)
            scores = torch.stack([query @ rotate(k[s][part], s) / math.sqrt(width) for s in range(t + 1)])
            heads.append(sum(p * v[s][part] for s, p in enumerate(scores.softmax(0))))
        outputs.append(w[f"{name}.o_proj.weight"] @ torch.cat(heads))
    return outputs


def feed_forward(w: dict[str, Tensor], name: str, x: Tensor, logits: list[Tensor]) -> Tensor:
    if f"{name}.gate_proj.weight" in w:
        return gated(w, name, x)
    logits.append(w[f"{name}.gate.weight"] @ x)
    scores = logits[-1].softmax(0)
    output = torch.sigmoid(w[f"{name}.shared_expert_gate.weight"] @ x) * gated(w, f"{name}.shared_expert", x)
    for expert in sorted(range(EXPERTS), key=lambda e: -scores[e])[:TOP_K]:
        output = output + scores[expert] * gated(w, f"{name}.experts.{expert}", x)  # not renormalised
    return output


def naive(w: dict[str, Tensor], points: list[float]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The forecasts of every head after every point, and all router logits."""
    w, logits = {name: tensor.double() for name, tensor in w.items()}, []
    embed = [w[f"model.embed_layer.{name}_layer.weight"][:, 0] for name in ("gate", "emb")]
    xs = [silu(embed[0] * point) * (embed[1] * point) for point in points]
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        mixed = attention(w, f"{layer}.self_attn", [rms_norm(x, w[f"{layer}.input_layernorm.weight"]) for x in xs])
        xs = [x + y for x, y in zip(xs, mixed)]
        inner = [rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"]) for x in xs]
        xs = [x + feed_forward(w, f"{layer}.ffn_layer", y, logits) for x, y in zip(xs, inner)]
    xs = [rms_norm(x, w["model.norm.weight"]) for x in xs]
    return [[w[f"lm_heads.{i}.out_layer.weight"] @ x for x in xs] for i in range(len(HORIZONS))], logits


POINTS = [0.3, -1.2, 0.7, 2.1, -0.4]


@pytest.fixture(scope="module", params=[False, True], ids=["sparse", "dense"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("time_moe") / "published"
    config = {**CONFIG, "use_dense": request.param, "apply_aux_loss": not request.param}
    tensors = random_tensors(shapes(request.param))
    return load(folder, config, tensors), tensors, config


def test_every_head_says_what_the_formula_says(loaded: Any):
    model, tensors, _ = loaded
    assert type(model) is TimeMoeForPrediction
    heads, _ = naive(tensors, POINTS)
    for head, horizon in zip(heads, HORIZONS):
        found = model(torch.tensor([POINTS]), max_horizon_length=horizon).logits[0]
        torch.testing.assert_close(found.double(), torch.stack(head), rtol=1e-4, atol=1e-5)
    with_channel = model(torch.tensor([POINTS])[..., None]).logits
    assert torch.equal(with_channel, model(torch.tensor([POINTS])).logits)


def test_it_saves_as_published(loaded: Any, tmp_path: Path):
    model, tensors, config = loaded
    saves_back(model, tmp_path / "again", config, tensors)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    points = torch.tensor([POINTS])
    assert torch.equal(model(points).logits, again(points).logits)


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) <= 2 else 2 * (abs(error) - 1)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_published_one(loaded: Any, masked: bool):
    """Mean over horizons of Huber losses, labels padded with zeros; Mixtral's balance loss over all layers."""
    model, tensors, config = loaded
    values, mask = [*POINTS[1:], 5.5], [1.0, 0.0, 1.0, 1.0, 1.0] if masked else None
    heads, logits = naive(tensors, POINTS)
    losses = []
    for head, horizon in zip(heads, HORIZONS):
        total, count = 0.0, 0.0
        for t in range(len(POINTS)):
            for i in range(horizon):
                inside = t + i < len(values)
                weight = (mask[t + i] if inside else 0.0) if mask else 1.0
                total += weight * huber(float(head[t][i]) - (values[t + i] if inside else 0.0))
                count += weight
        losses.append(total / count)
    expected = sum(losses) / len(losses)
    given = {"labels": torch.tensor([values]), "loss_masks": torch.tensor([mask]) if mask else None}
    assert model(torch.tensor([POINTS]), **given).loss.item() == pytest.approx(expected, rel=1e-4)
    if not config["use_dense"]:
        scores = torch.stack(logits).softmax(-1)
        chosen = scores.topk(TOP_K).indices.flatten().bincount(minlength=EXPERTS) / len(scores)
        expected += 0.02 * EXPERTS * float((chosen * scores.mean(0)).sum())
    model.train()
    output = model(torch.tensor([POINTS]), **given)
    model.eval()
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("new", [1, 2, 3, 13])
def test_generate_uses_the_largest_head_that_fits(loaded: Any, new: int, use_cache: bool):
    model, tensors, _ = loaded
    points = list(POINTS)
    while (rest := len(POINTS) + new - len(points)) > 0:
        number = max(i for i, horizon in enumerate(HORIZONS) if horizon <= rest)
        points += [float(value) for value in naive(tensors, points)[0][number][-1]]
    found = model.generate(torch.tensor([POINTS]), max_new_tokens=new, use_cache=use_cache)
    torch.testing.assert_close(found[0].double(), torch.tensor(points).double(), rtol=1e-3, atol=1e-4)
    padded = torch.tensor([[9.0, 9.0, *POINTS], [*POINTS, *POINTS[:2]]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    both = model.generate(padded, attention_mask=mask, max_length=7 + new, use_cache=use_cache)
    torch.testing.assert_close(both[0, 2:], found[0], rtol=1e-3, atol=1e-4)


def test_a_first_head_that_is_too_long_is_cut_off():
    torch.manual_seed(0)
    config = TimeMoeConfig(**{**CONFIG, "horizon_lengths": [4], "input_size": 2})
    model = TimeMoeForPrediction(config).eval()
    points = torch.randn(2, 5, 2)
    found = model.generate(points, max_new_tokens=3)
    assert found.shape == (2, 8, 2)
    assert torch.equal(found[:, 5:].flatten(1), model(points).logits[:, -1, :6])


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 6), horizon=st.integers(1, 9), channels=st.integers(1, 2))
def test_windows_end_in_zeros(length: int, horizon: int, channels: int):
    labels = torch.randn(1, length, channels)
    targets = torch.zeros(1, length, horizon, channels)
    for t in range(length):
        for i in range(min(horizon, length - t)):
            targets[0, t, i] = labels[0, t + i]
    assert forecast_loss(targets.flatten(2), labels, horizon) == 0
    assert forecast_loss(targets.flatten(2) + 1, labels, horizon).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"inputs": torch.ones(1, 3)}, "max_new_tokens"),
        ({"inputs": torch.ones(1, 3, dtype=torch.long), "max_new_tokens": 1}, "floating-point"),
        (
            {"inputs": torch.ones(1, 2), "max_new_tokens": 1, "attention_mask": torch.tensor([[1, 0]])},
            "pad on the left",
        ),
    ],
)
def test_what_cannot_be_forecast_is_refused(arguments: dict[str, Any], says: str):
    model = TimeMoeForPrediction(TimeMoeConfig(**CONFIG))
    with pytest.raises(ValueError, match=says):
        model.generate(**arguments)


@pytest.mark.parametrize("wrong", [{"horizon_lengths": [8, 1]}, {"horizon_lengths": [0]}, {"intermediate_size": 13}])
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimeMoeConfig(**{**CONFIG, **wrong})


def test_the_sizes_of_the_released_models():
    """50M: 113M in all, "base"; 200M: 453M in all, "large" (paper, table 2)."""
    for sizes, millions in (({}, 113), ({"hidden_size": 768, "intermediate_size": 3072}, 453)):
        config = AutoConfig.for_model("time_moe", **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_trainer_learns_a_sine(tmp_path: Path):
    torch.manual_seed(0)
    waves = [torch.sin(torch.arange(33) * 0.5 + phase) for phase in torch.rand(64) * 6]
    rows: Any = [{"input_ids": wave[:-1], "labels": wave[1:]} for wave in waves]
    model = TimeMoeForPrediction(TimeMoeConfig(**{**CONFIG, "hidden_size": 16, "initializer_range": 0.5}))
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 40}
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, **options
    )
    before = model(torch.stack(waves)[:, :-1], labels=torch.stack(waves)[:, 1:]).loss.item()
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    after = model(torch.stack(waves)[:, :-1], labels=torch.stack(waves)[:, 1:]).loss.item()
    assert after < 0.6 * before
