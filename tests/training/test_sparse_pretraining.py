"""Pruning while training: the schedule against numeric integrals, the masks against definitions, resuming exact."""

import sys
from math import isclose
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe import moe_layers
from hf_moe.training import RestoreExperts, SparsePretraining, average_parameter_count
from hf_moe.training.parameters import group_of_each
from hf_moe.training.sparse_pretraining import CURVES, largest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance

NAMES = st.sampled_from(sorted(CURVES))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 0.45), st.floats(0.5, 1.0), st.floats(0.05, 1.0), NAMES)
def test_closed_forms(start, end, final, curve):
    """Against the mean of the curve itself, by the midpoint rule."""
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    u = ((grid - start) / (end - start)).clamp(0, 1).tolist()
    mean = sum(CURVES[curve](1.0, final, part) for part in u) / len(u)
    assert isclose(average_parameter_count(1.0, final, start, end, curve), mean, rel_tol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95), NAMES)
def test_compute_of_steps(sparsity, curve):
    """A run in many small steps: the compute it has done where the schedule says 25% and 75%, and its mean count."""
    schedule = SparsePretraining(sparsity, curve=curve)
    schedule.initial, schedule.prunable = 1000, 900
    steps = 500
    live = [schedule.initial - schedule.prunable * schedule.sparsity_at((s + 0.5) / steps) for s in range(steps)]
    done = torch.tensor(live, dtype=torch.float64).cumsum(0)
    done = done / done[-1]
    started = next(i for i, n in enumerate(live) if n < schedule.initial)
    ended = next(i for i, n in enumerate(live) if n <= schedule.final + 1e-9)
    assert abs(done[started] - 0.25) < 0.01 and abs(done[ended] - 0.75) < 0.01
    assert schedule.average_parameter_count() == pytest.approx(sum(live) / len(live), rel=1e-3)
    by_steps = SparsePretraining(sparsity, of="steps", curve=curve)
    by_steps.initial, by_steps.prunable = 1000, 900
    assert by_steps.average_parameter_count() == average_parameter_count(1000, by_steps.final, curve=curve)
    assert schedule.average_parameter_count() != by_steps.average_parameter_count()


def trainer(folder, kind: str, callback: SparsePretraining) -> balance.Trainer:
    args = balance.arguments(1, learning_rate=1e-2)
    args.output_dir, args.max_steps, args.save_strategy, args.save_steps = str(folder), 12, "steps", 6
    args.optim = "adamw_torch"
    data, collate = invariance.padded(), balance.default_data_collator
    network = invariance.network(kind)
    return balance.Trainer(network, args, collate, train_dataset=data, callbacks=[callback, RestoreExperts()])


@pytest.mark.parametrize("kind", ["qwen3_moe", "hf_moe"])
def test_in_trainer(kind, tmp_path):
    whole = trainer(tmp_path, kind, callback := SparsePretraining(0.6, every=2))
    whole.train()
    kinds = group_of_each(whole.model)
    for name, parameter in whole.model.named_parameters():
        zeros = (parameter == 0).flatten(-2).sum(-1) if parameter.dim() > 1 else (parameter == 0).sum()
        dense = kinds[name] in ("router", "embeddings", "norms") or parameter.dim() < 2
        size = parameter.shape[-1] * parameter.shape[-2] if parameter.dim() > 1 else 0
        wanted = 0 if dense else round(0.6 * size)  # every expert by itself
        if kinds[name] not in ("norms", "embeddings"):  # a row of padding is 0
            assert (zeros == wanted).all(), name
    assert callback.live == callback.initial - sum(
        int((p == 0).sum())
        for n, p in whole.model.named_parameters()
        if kinds[n] not in ("router", "norms", "embeddings")
    )
    resumed = trainer(tmp_path, kind, SparsePretraining(0.6, every=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name
    for layer in moe_layers(whole.model):
        assert (layer.gate.weight != 0).all()


def test_smallest_go():
    weight = torch.tensor([[[3.0, -1.0, 0.5], [2.0, -0.1, 4.0]], [[1.0, 1.0, 1.0], [9.0, 8.0, 7.0]]])
    kept = largest(weight, 0.5)
    assert kept.tolist() == [[[True, False, False], [True, False, True]], [[False] * 3, [True] * 3]]


def test_errors():
    frozen = invariance.network("qwen3_moe").requires_grad_(False)
    with pytest.raises(ValueError, match="has frozen weights: train all of them"):
        SparsePretraining().on_train_begin(None, None, None, frozen)
    with pytest.raises(ValueError, match=r"start=0.8 and end=0.75: the pruning phase"):
        SparsePretraining(start=0.8)
    with pytest.raises(ValueError, match="curve='square' is unknown"):
        average_parameter_count(2, 1, curve="square")
    with pytest.raises(ValueError, match=r"sparsity=1.0 must be between 0 and 1"):
        SparsePretraining(1.0)
