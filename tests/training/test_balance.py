"""A balance loss counts once, with the same coefficient, whatever trains the model and however it cuts the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_moe.modeling.losses import RouterLogits, router_z_loss, share_of_labels, switch_loss

sys.path.insert(0, str(Path(__file__).parent))
import balance

TYPES = ["bam", "rmoe", "mole", "hf_moe", "moa"]


def same(actual: balance.Gradients, expected: balance.Gradients, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys() and any("gate" in name for name in actual)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestValues:
    def test_perfect_balance_is_one(self):
        for experts, k in ((4, 1), (4, 2), (8, 3)):
            scores = torch.full((experts, experts), 1 / experts)
            indices = torch.stack([(torch.arange(k) + n) % experts for n in range(experts)])
            assert switch_loss(scores, indices, torch.ones(experts, k)).item() == pytest.approx(1)

    def test_collapse_is_the_number_of_experts(self):
        scores, indices = torch.eye(4)[torch.zeros(5, dtype=torch.long)], torch.zeros(5, 1, dtype=torch.long)
        assert switch_loss(scores, indices, torch.ones(5, 1)).item() == pytest.approx(4)

    def test_padding_tokens_and_empty_slots_do_not_count(self):
        torch.manual_seed(0)
        scores, indices = torch.rand(6, 4).softmax(-1), torch.randint(0, 4, (6, 2))
        mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
        expected = switch_loss(scores[mask], indices[mask], torch.ones(4, 2))
        torch.testing.assert_close(switch_loss(scores, indices, torch.ones(6, 2), mask), expected)
        half_empty = torch.tensor([[1.0, 0.0]]).expand(6, 2)
        torch.testing.assert_close(
            switch_loss(scores, indices, half_empty), switch_loss(scores, indices[:, :1], half_empty[:, :1])
        )
        torch.testing.assert_close(router_z_loss(scores, mask), router_z_loss(scores[mask]))
        assert switch_loss(scores, indices, torch.ones(6, 2), torch.zeros(6).bool()) == 0

    def test_share_of_labels(self):
        labels = torch.tensor([[5, 6, -100, 7], [5, -100, -100, -100]])
        assert share_of_labels(labels) == 1
        assert share_of_labels(labels, 8).item() == pytest.approx(2 / 8)
        assert share_of_labels(labels, torch.tensor(8), shift_labels=labels).item() == pytest.approx(4 / 8)


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_does_not_change_the_loss(model_type):
    network, row = balance.model(model_type).train(), torch.arange(3, 13)[None]
    expected = network.model(row, use_cache=False).router_losses
    padded = torch.cat([row, torch.zeros(1, 5, dtype=torch.long)], 1)
    actual = network.model(padded, attention_mask=(padded != 0).long(), use_cache=False).router_losses
    torch.testing.assert_close(actual, expected)
    unmasked = network.model(padded, use_cache=False).router_losses
    assert not torch.allclose(unmasked, expected, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_cross_entropy_plus_the_weighted_terms(model_type):
    network = balance.model(model_type, router_z_loss_coef=0.3).train()
    network.config.router_aux_loss_coef = 0.7
    row = torch.arange(3, 13)[None]
    outputs = network(row, labels=row, use_cache=False)
    switch, z, _ = network.model(row, use_cache=False).router_losses
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], row[0, 1:])
    torch.testing.assert_close(outputs.loss, cross_entropy + 0.7 * switch + 0.3 * z)
    torch.testing.assert_close(outputs.aux_loss * 0.7, 0.7 * switch + 0.3 * z)
    torch.testing.assert_close(network.eval()(row, labels=row).loss, cross_entropy)  # perplexity stays perplexity


@pytest.mark.parametrize("equal_labels", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("model_type", TYPES)
def test_accumulation_does_not_change_the_gradient(model_type, equal_labels):
    data = balance.rows(equal_labels=equal_labels)
    expected = balance.by_hand(balance.model(model_type), data)
    for accumulation in (1, 4, 8):
        same(balance.with_trainer(balance.model(model_type), data, accumulation), expected)


def test_the_z_loss_is_exactly_invariant_on_different_rows():
    """A mean over tokens, unlike Switch's product of means, does not depend on the cut at all."""
    data, settings = balance.rows(same_tokens=False), {"router_z_loss_coef": 1.0}
    networks = [balance.model("bam", **settings) for _ in range(4)]
    for network in networks:
        network.config.router_aux_loss_coef = 0.0
    expected = balance.by_hand(networks[0], data)
    for network, accumulation in zip(networks[1:], (1, 4, 8)):
        same(balance.with_trainer(network, data, accumulation), expected)


def test_different_rows_keep_the_strength_of_the_switch_loss():
    """Its statistic is the micro-batch's, so the direction varies, but the strength must not grow with the steps."""
    data = balance.rows(same_tokens=False)
    one, eight = (balance.with_trainer(balance.model("bam"), data, steps) for steps in (1, 8))
    name = "model.layers.0.mlp.gate.weight"
    assert 0.7 < (eight[name].norm() / one[name].norm()).item() < 1.6


@pytest.mark.parametrize("model_type", TYPES)
def test_trl_counts_it_once(model_type, tokenizer):
    data = balance.rows()
    expected = balance.by_hand(balance.model(model_type), data)
    for accumulation, checkpointing in ((1, False), (4, False), (1, True)):  # TRL checkpoints by default
        same(balance.with_trl(balance.model(model_type), data, tokenizer, accumulation, checkpointing), expected)


def test_trl_trains_a_dense_composition(tokenizer):
    block = {"mixer": {"type": "attention"}, "feed_forward": {"type": "mlp", "intermediate_size": 16}}
    dense = {"blocks": {"dense": block}}
    data = balance.rows()
    expected = balance.by_hand(balance.model("hf_moe", **dense), data)
    actual = balance.with_trl(balance.model("hf_moe", **dense), data, tokenizer)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    out = tmp_path / "gradients.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", balance.__file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = balance.by_hand(balance.model(), balance.rows(equal_labels=False))
    same(load_file(out), expected)


def test_router_logits_without_their_loss_are_refused():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    with pytest.raises(ValueError, match="lost their balance loss"):
        load_balancing_loss_func(RouterLogits([torch.zeros(2, 4)]), 4, 2)
    logits = (torch.tensor([[9.0, 0.0], [0.0, 9.0]]),)
    assert load_balancing_loss_func(logits, 2, 1).item() == pytest.approx(1, abs=1e-3)  # natives are untouched


def test_label_smoothing_shifts_the_labels():
    """Trainer looks our class up by name before it decides to; otherwise the model would learn to copy its input."""
    network = balance.model("bam").train()
    args = balance.arguments(1)
    args.label_smoothing_factor = 0.1
    batch = balance.default_data_collator(list(balance.rows()))
    loss = balance.Trainer(network, args, train_dataset=balance.rows()).compute_loss(network, dict(batch))
    logits, targets = network(batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
