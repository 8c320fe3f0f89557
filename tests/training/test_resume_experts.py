"""Native models resume with their experts, biases, schedules and random numbers; without the callback they do not."""

import sys
from pathlib import Path

import pytest
import torch

from hf_moe.training import BiasBalancing, LoadBalancing, RestoreExperts

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import steps
import test_resume
from mixture_models import STOCK, mixture_model

MISSING = "missing keys in the checkpoint model loaded"
UNEXPECTED = "unexpected keys in the checkpoint model loaded"


def native(kind: str, seed: int = 0) -> torch.nn.Module:
    """With dropout: a resumed run must draw the same numbers."""
    settings = {"attention_dropout": 0.1} if kind != "flex_olmo" else {}
    return mixture_model(kind, seed, vocab_size=256, num_hidden_layers=2, **settings).train()


def callbacks(kind: str, restore: bool = True) -> list:
    balancing = BiasBalancing(lambda step: 0.01 / (step + 1), "sign_zero_mean")
    return [LoadBalancing(), *([balancing] if kind == "deepseek_v3" else []), *([RestoreExperts()] if restore else [])]


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", sorted(STOCK))
def test_resume_is_bit_exact(kind, tmp_path):
    whole = test_resume.trainer(native(kind), tmp_path, callbacks(kind))
    whole.train()
    resumed = test_resume.trainer(native(kind, seed=1), tmp_path, callbacks(kind))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name
    assert losses(whole)[2:] == losses(resumed)[2:]


@pytest.mark.allow_warnings(MISSING, UNEXPECTED)
def test_without_the_callback_experts_are_lost(tmp_path):
    """The fault in Transformers 5.23; when this fails, `RestoreExperts` can go."""
    whole = test_resume.trainer(native("qwen3_moe"), tmp_path, callbacks("qwen3_moe", restore=False))
    whole.train()
    other = native("qwen3_moe", seed=1)
    resumed = test_resume.trainer(other, tmp_path, callbacks("qwen3_moe", restore=False))
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    wrong = {n for n, t in whole.model.state_dict().items() if not torch.equal(t, other.state_dict()[n])}
    assert wrong == {n for n, _ in other.named_parameters() if ".experts." in n}


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_load_best_model_at_end(kind, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = test_resume.trainer(native(kind), tmp_path, callbacks(kind), **best)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # greater is better: not the last one
    stored = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    for (name, expected), actual in zip(stored.state_dict().items(), run.model.state_dict().values()):
        assert torch.equal(actual, expected), name


@pytest.mark.allow_warnings(MISSING, UNEXPECTED)  # Trainer counts the keys of each shard by itself
def test_shards(tmp_path):
    """The experts of a layer may lie in several files."""
    whole, other = native("qwen3_moe"), native("qwen3_moe", seed=1)
    whole.save_pretrained(tmp_path / "checkpoint-2", max_shard_size="24KB")
    assert len(list((tmp_path / "checkpoint-2").glob("*.safetensors"))) > 3
    test_resume.trainer(other, tmp_path, callbacks("qwen3_moe"))._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(whole.state_dict().items(), other.state_dict().values()):
        assert torch.equal(actual, expected), name


@pytest.mark.allow_warnings("missing keys in the checkpoint model loaded: ['lm_head.weight']")  # tied: any such model
def test_ours_resume_with_schedule_and_biases(tmp_path):
    def all_callbacks():
        return [BiasBalancing(0.01, "inverse_sqrt"), LoadBalancing("global", 0.1, 0.01), RestoreExperts()]

    whole = test_resume.trainer(steps.model(attention_dropout=0.1), tmp_path, all_callbacks())
    whole.train()
    network = steps.model(attention_dropout=0.1)
    for tensor in network.state_dict().values():
        tensor += 0.1
    resumed = test_resume.trainer(network, tmp_path, all_callbacks())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(whole)[2:] == losses(resumed)[2:]
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    wrong = mixture_model("qwen3_moe", vocab_size=256, num_hidden_layers=2, moe_intermediate_size=8)
    wrong.save_pretrained(tmp_path / "checkpoint-2")
    run = test_resume.trainer(native("qwen3_moe"), tmp_path, [RestoreExperts()])
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|does not fit"):
        run._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
