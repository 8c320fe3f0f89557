"""What is logged about routing is what happened, and a collapse or a NaN is told once."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from hf_moe import moe_layers
from hf_moe.training import ReportNaN, RoutingMetrics, routing_metrics
from hf_moe.training.routing_metrics import spread

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance

FIGURES = {"utilization", "max_vio", "entropy", "dead_experts", "drop_rate"}


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any))
def test_the_figures_by_their_formulas(loads):
    found = routing_metrics(torch.tensor(loads).float(), sum(loads) * 2)
    mean, total = sum(loads) / len(loads), sum(loads)
    entropy = -sum(c / total * math.log(c / total) for c in loads if c) / math.log(len(loads))
    expected = {
        "utilization": sum(min(1, c / mean) for c in loads) / len(loads),
        "max_vio": max(loads) / mean - 1,
        "entropy": entropy,
        "dead_experts": loads.count(0),
        "drop_rate": 0.5,
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_fair_and_collapsed():
    assert routing_metrics(torch.full((8,), 3.0)) == pytest.approx(
        {"utilization": 1, "max_vio": 0, "entropy": 1, "dead_experts": 0, "drop_rate": 0}
    )
    collapsed = routing_metrics(torch.tensor([4.0, 0, 0, 0]))
    assert (collapsed["utilization"], collapsed["max_vio"], collapsed["entropy"]) == (0.25, 3, 0)
    assert set(routing_metrics(torch.zeros(4)).values()) == {0.0}


def test_spread():
    assert list(spread(3, 8)) == [0, 1, 2] and list(spread(9, 3)) == [0, 4, 8]
    assert list(spread(9, 0)) == [] and list(spread(9, 1)) == [0]


class Reporter(balance.TrainerCallback):
    """Sees what TensorBoard would."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def run(kind: str, accumulation: int = 1, steps: int = 1, change=None, **extra) -> tuple[Reporter, Trainer]:
    model = invariance.network(kind)
    if change is not None:
        change(model)
    reporter, args = Reporter(), balance.arguments(accumulation, **extra)
    args.max_steps, args.logging_steps, args.logging_first_step = steps, 1, True
    collate = balance.default_data_collator
    trainer = Trainer(model, args, collate, train_dataset=invariance.padded(), callbacks=[reporter])
    trainer.add_callback(RoutingMetrics(trainer))
    trainer.train()
    return reporter, trainer


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "hf_moe", "rmoe"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_road_counts_the_same_real_tokens(kind, checkpointed):
    """Reporters, which are called before other callbacks, see the figures; so does `log_history`."""
    extra = {"activation_checkpointing": True} if checkpointed else {}
    reporter, trainer = run(kind, 4, **extra)
    logged = next(logs for logs in reporter.logs if "loss" in logs)
    assert {key for key in trainer.state.log_history[0] if key.startswith("moe/")} == {
        key for key in logged if key.startswith("moe/")
    }
    loads = {}
    model = invariance.network(kind).eval()
    layers = list(moe_layers(model))
    for layer in layers:
        layer.gate.register_forward_hook(
            lambda module, args, output, name=layer.name: loads.setdefault(name, []).append(
                output.indices if hasattr(output, "indices") else output[2]
            )
        )
    for ids in invariance.sequences():
        model(ids[None], use_cache=False)
    for number, layer in enumerate(layers):
        counts = torch.bincount(torch.cat(loads[layer.name]).flatten(), minlength=layer.num_experts).float()
        for figure, value in routing_metrics(counts).items():
            assert logged[f"moe/layer_{number:02d}/{figure}"] == pytest.approx(value, abs=1e-6)
    vios = [logged[f"moe/layer_{number:02d}/max_vio"] for number in range(len(layers))]
    assert logged["moe/max_vio"] == pytest.approx(sum(vios) / len(vios))
    assert logged["moe/max_vio_worst"] == max(vios)
    assert "log" not in vars(trainer) and not layers[0].gate._forward_hooks.keys() - {
        0,
        *layers[0].gate._forward_hooks,
    }


def test_the_number_of_keys_is_capped():
    trainer = Trainer(invariance.network("rmoe"), balance.arguments(1), train_dataset=balance.rows())
    metrics = RoutingMetrics(trainer, max_layers=1)
    figures = {f"layer{number}": routing_metrics(torch.ones(4)) for number in range(50)}
    assert len(metrics.keys(figures)) == len(FIGURES) + 1 + len(FIGURES)
    with pytest.raises(ValueError, match="max_layers=-1"):
        RoutingMetrics(trainer, -1)


def collapse(model) -> None:
    """Two experts get every token: the rows of the others are the same, and tokens are positive."""
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.gate.weight.zero_()
            layer.gate.register_forward_pre_hook(lambda module, args: (args[0].abs(), *args[1:]))
            layer.gate.weight[1:3] = 5.0


def test_a_collapse_is_told_once():
    with pytest.warns(UserWarning, match="has collapsed onto experts") as caught:
        run("qwen3_moe", steps=3, change=collapse, learning_rate=0.0)
    found = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    assert len(found) == 1
    assert "Step 1: the router 'model.layers.1.mlp' has collapsed onto experts 1, 2 (MaxVio 1.00 of at most 1.00)" in (
        found[0].replace("experts 2, 1", "experts 1, 2")
    )


def train_with(callback, model, steps: int = 4) -> Trainer:
    args = balance.arguments(1, learning_rate=0.0)
    args.max_steps, args.logging_steps = steps, 1
    collate = balance.default_data_collator
    trainer = Trainer(model, args, collate, train_dataset=invariance.padded(), callbacks=[callback])
    trainer.train()
    return trainer


class Break(balance.TrainerCallback):
    """Makes a weight NaN at the beginning of a step."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.get_parameter(self.name).data.fill_(math.nan)


@pytest.mark.parametrize("stop", [False, True])
def test_a_nan_is_told_once_with_its_step_and_layer(stop):
    model = invariance.network("mixtral")
    report = ReportNaN(stop)
    args = balance.arguments(1, learning_rate=0.0)
    args.max_steps, args.logging_steps = 4, 1
    broken = Break(2, "model.layers.1.input_layernorm.weight")
    with pytest.warns(UserWarning, match="NaN") as caught:
        collate = balance.default_data_collator
        data = invariance.padded()
        trainer = Trainer(model, args, collate, train_dataset=data, callbacks=[broken, report])
        trainer.train()
    found = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
    assert len(found) == 1 and found[0].startswith(
        "Step 2: NaN or infinite values in the logits of the router 'model.layers.1.mlp'. Go back to the last good"
    )
    assert trainer.state.global_step == (2 if stop else 4)


def test_a_nan_loss_behind_the_routers():
    broken = Break(1, "lm_head.weight")
    args = balance.arguments(1, learning_rate=0.0)
    args.logging_steps = 1
    with pytest.warns(UserWarning, match="Step 1: NaN or infinite values in the loss"):
        Trainer(
            invariance.network("mixtral"),
            args,
            balance.default_data_collator,
            train_dataset=invariance.padded(),
            callbacks=[broken, ReportNaN()],
        ).train()


def test_sound_numbers_are_not_reported():
    train_with(ReportNaN(), invariance.network("hf_moe"))
