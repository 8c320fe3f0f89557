"""Resuming a Trainer run restores everything, experts included."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import balance

# every kind of stored experts, names of others, state in buffers, modules of the whole depth
LAYOUTS = [
    "bam",
    "based",
    "blockffn",
    "mole",
    "rmoe",
    "monet",
    "ling",
    "peer",
    "ultramem",
    "smoe_dropout",
    "rexmoe",
    "coe",
]


def trainer(network, folder: Path, callbacks: Sequence[TrainerCallback] = (), **extra) -> Trainer:
    """Four steps, a checkpoint and an evaluation after each second one."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        disable_tqdm=True,
        logging_steps=1,
        **extra,
    )
    data = balance.rows(same_tokens=False)
    collate = default_data_collator
    return Trainer(network, args, collate, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


@pytest.mark.allow_warnings("missing keys in the checkpoint model loaded: ['lm_head.weight']")  # tied: any such model
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_resume_is_bit_exact(model_type, tmp_path):
    whole = trainer(balance.model(model_type), tmp_path)
    whole.train()
    torch.manual_seed(123)  # another initialisation: whatever is not restored shows
    config = tiny_config(model_type, initializer_range=0.5, router_aux_loss_coef=1.0)
    resumed = trainer(balance.hf_moe.ARCHITECTURES[model_type][2](config), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0][2:] == losses[1][2:]


@pytest.mark.allow_warnings("missing keys in the checkpoint model loaded: ['lm_head.weight']")  # tied: any such model
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_load_best_model_at_end(model_type, tmp_path):
    # greater is better: the best is the first checkpoint, so the end state must be replaced
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(balance.model(model_type), tmp_path, **best)
    run.train()
    assert run.state.best_model_checkpoint and run.state.best_model_checkpoint.endswith("checkpoint-2")
    stored = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    for (name, expected), actual in zip(stored.state_dict().items(), run.model.state_dict().values()):
        assert torch.equal(actual, expected), name
