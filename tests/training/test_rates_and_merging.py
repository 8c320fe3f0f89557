"""Schedules by their formulas, and checkpoints that merge into what a decayed rate would have given."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer

from hf_moe import moe_layers
from hf_moe.training import (
    BiasBalancing,
    WithSchedule,
    get_power_schedule,
    get_wsdc_schedule,
    merge_checkpoints,
    merge_coefficients,
    power_rate,
)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance


def rates(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_papers_value():
    """10^13 tokens, batches of 1,024 sequences: 0.0011."""
    assert power_rate(1e13, 1024 * 4096, a=4.6) == pytest.approx(1.104e-3, rel=1e-3)
    assert power_rate(1.0, 1024 * 4096) == 0.02


def test_power_phases():
    batch = 8 * 4096
    found = rates(lambda optimizer: get_power_schedule(optimizer, 100, batch, num_warmup_steps=10), 100)
    law = [min(0.02, 8 * 4.0 * (step * batch) ** -0.51) for step in range(1, 101)]
    assert found[0] == 0 and found[5] == pytest.approx(0.5 * law[9])
    assert found[10:90] == pytest.approx(law[9:89])
    assert found[90:] == pytest.approx([law[89] * 0.01 ** ((step + 1) / 10) for step in range(10)])


def test_wsdc_phases():
    found = rates(lambda optimizer: get_wsdc_schedule(optimizer, 2, 5, 4, min_lr_ratio=0.1, decay_type="linear"), 20)
    assert found[:2] == pytest.approx([0.1, 0.55]) and found[2:7] == pytest.approx([1] * 5)
    assert found[7:11] == pytest.approx([1 - 0.9 * step / 4 for step in range(4)]) and found[11:] == [0.1] * 9


def test_in_trainer_with_resume(tmp_path):
    class Power(WithSchedule, Trainer):
        schedule = staticmethod(lambda optimizer, steps: get_power_schedule(optimizer, steps, 32))

    def trainer() -> Trainer:
        args = balance.arguments(1, learning_rate=0.5, logging_steps=1)
        args.output_dir, args.max_steps, args.save_strategy, args.save_steps = str(tmp_path), 4, "steps", 2
        return Power(invariance.network("hf_moe"), args, balance.default_data_collator, train_dataset=balance.rows())

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [
        [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log] for run in (whole, resumed)
    ]
    assert logged[0] == logged[1] and len(set(logged[0])) > 1 and max(logged[0]) <= 0.5 * 0.02


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 99))
def test_merging_is_the_decay(multipliers, seed):
    """Plain gradient blocks: the merged weights are those of the run whose blocks were multiplied by w."""
    decay = sorted(multipliers, reverse=True)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(5, generator=generator).double()
    blocks = torch.randn(len(decay), 5, generator=generator).double()
    checkpoints = torch.cat([start[None], start + blocks.cumsum(0)])
    coefficients = merge_coefficients(decay)
    merged = (torch.tensor(coefficients).double()[:, None] * checkpoints).sum(0)
    torch.testing.assert_close(merged, start + (torch.tensor(decay).double()[:, None] * blocks).sum(0))
    assert sum(coefficients) == pytest.approx(1)


def test_the_papers_coefficients():
    assert merge_coefficients([1, 0.8, 0.6, 0.4, 0.2]) == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "hf_moe"])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_a_run(kind, sharded, tmp_path):
    """Per-expert files, shards and selection biases; the result loads as any model."""
    args = balance.arguments(1, learning_rate=0.1)
    args.output_dir, args.max_steps, args.save_strategy, args.save_steps = str(tmp_path), 3, "steps", 1
    callbacks = [BiasBalancing(0.1)] if kind != "qwen3_moe" else []
    model = invariance.network(kind)
    Trainer(model, args, balance.default_data_collator, train_dataset=balance.rows(), callbacks=callbacks).train()
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    load = type(model).from_pretrained
    states = [load(folder).state_dict() for folder in folders]
    if sharded:
        for folder in folders:
            network = load(folder)
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            network.save_pretrained(folder, max_shard_size="20KB")
    merged = merge_checkpoints(folders, tmp_path / "merged", [0.5, 0.3, 0.2])
    again = AutoModelForCausalLM.from_pretrained(merged)
    for name, tensor in again.state_dict().items():
        expected = 0.5 * states[0][name] + 0.3 * states[1][name] + 0.2 * states[2][name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)
    biases = [layer.selection_bias for layer in moe_layers(again) if layer.selection_bias is not None]
    assert (kind == "qwen3_moe") == (not biases) and all(bias.any() for bias in biases)
    assert not list(tmp_path.glob("*.tmp"))


class TestErrors:
    def test_values(self, tmp_path):
        for decay in ([], [0.5, 0.6], [1.2], [-0.1]):
            with pytest.raises(ValueError, match="must fall, from at most 1 to at least 0"):
                merge_coefficients(decay)
        with pytest.raises(ValueError, match="0 checkpoints need"):
            merge_checkpoints([], tmp_path / "x")
        with pytest.raises(ValueError, match="as many coefficients that sum to 1"):
            merge_checkpoints([tmp_path], tmp_path / "x", [0.5])
        with pytest.raises(FileExistsError, match="is there already"):
            merge_checkpoints([tmp_path], tmp_path)
        with pytest.raises(ValueError, match="holds neither model"):
            merge_checkpoints([tmp_path], tmp_path / "x")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        with pytest.raises(ValueError, match="do not fit into 10 steps"):
            get_power_schedule(optimizer, 10, 1.0, num_warmup_steps=11)
        with pytest.raises(ValueError, match="min_lr_ratio=0 must be above 0"):
            get_wsdc_schedule(optimizer, 1, 1, 1, min_lr_ratio=0)
