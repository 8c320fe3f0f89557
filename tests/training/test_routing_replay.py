"""Routing that is replayed: the same experts in recomputation, and in a forward pass over a rollout."""

import sys
from pathlib import Path

import pytest
import torch

from hf_moe import moe_layers
from hf_moe.training import RoutingReplay

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance

KINDS = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "hf_moe", "rmoe", "mole"]


def make_stochastic(model) -> list[int]:
    """Every router prefers experts at random, by numbers that checkpointing does not draw again; returns the calls."""
    generator, calls = torch.Generator().manual_seed(0), []

    def forward(gate, plain):
        def run(tokens, *args, **kwargs):
            calls.append(1)
            with Noise(generator):
                return plain(tokens, *args, **kwargs)

        return run

    class Noise(torch.overrides.TorchFunctionMode):
        def __init__(self, generator) -> None:
            super().__init__()
            self.generator = generator

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.topk, torch.Tensor.topk) and args[0].dim() == 2:
                noise = torch.rand(args[0].shape, generator=self.generator)
                result = func(args[0].detach() * 0 + noise, *args[1:], **(kwargs or {}))
                return torch.return_types.topk((args[0].gather(1, result.indices), result.indices))
            return func(*args, **(kwargs or {}))

    for layer in moe_layers(model):
        layer.gate.forward = forward(layer.gate, layer.gate.forward)
    return calls


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "hf_moe"])
def test_recomputation_chooses_what_the_forward_pass_chose(kind):
    """By hand: one batch, so that the same random numbers are drawn with and without checkpointing."""

    def run(checkpointed: bool, replayed: bool) -> balance.Gradients:
        model = invariance.network(kind)
        make_stochastic(model)
        replay = RoutingReplay(model) if replayed else None
        if checkpointed and replay is not None:
            replay.pin_recomputation()
        elif checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = balance.default_data_collator(list(invariance.padded()))
        model.train()(**batch, use_cache=False).loss.backward()
        if replay is not None:
            replay.detach()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = run(checkpointed=False, replayed=False)
    pinned, loose = run(True, True), run(True, False)
    for name, gradient in expected.items():
        torch.testing.assert_close(pinned[name], gradient, atol=1e-6, rtol=1e-5)
    assert any((loose[name] - gradient).abs().max() > 1e-3 for name, gradient in expected.items())


def test_as_a_callback_of_trainer():
    plain = invariance.network("qwen3_moe")
    make_stochastic(plain)
    expected = balance.with_trainer(plain, invariance.padded())
    model = invariance.network("qwen3_moe")
    make_stochastic(model)
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    found = balance.with_trainer(model, invariance.padded(), callbacks=[RoutingReplay()], **settings)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_replayed(kind):
    """Recorded in generation, token by token; replayed by a policy that would choose otherwise."""
    model = invariance.network(kind).eval()
    prompts = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    replay = RoutingReplay(model)
    with replay.record() as recording, torch.no_grad():
        rollout = model.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    routed = recording.routed_experts
    layers = list(moe_layers(model))
    assert routed.shape == (2, 8, len(layers), layers[0].top_k) and rollout.shape == (2, 9)
    seen = {}
    for number, layer in enumerate(layers):
        layer.gate.register_forward_hook(
            lambda m, a, output, number=number: seen.update(
                {number: output.indices if hasattr(output, "indices") else output[2]}
            )
        )
    with torch.no_grad():
        before = model(rollout).logits
        for layer in layers:  # the policy has moved on
            for parameter in layer.gate.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model(rollout)
    own = torch.stack([seen[number].view(2, 9, -1) for number in range(len(layers))], 2)
    assert not torch.equal(own[:, :8].sort(-1).values, routed.sort(-1).values)
    with replay.replay(routed):
        logits = model(rollout).logits
    found = torch.stack([seen[number].view(2, 9, -1) for number in range(len(layers))], 2)
    assert torch.equal(found[:, :8], routed)
    assert logits.isfinite().all() and not torch.allclose(logits, before)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for layer in layers for p in layer.gate.parameters())
    replay.detach()
    assert all("forward" not in vars(layer.gate) for layer in layers)


def test_with_the_same_weights_a_replay_changes_nothing():
    model = invariance.network("qwen3_moe").eval()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    replay = RoutingReplay(model)
    with replay.record() as recording, torch.no_grad():
        expected = model(ids).logits
    with replay.replay(recording.routed_experts), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    with replay.replay(torch.full_like(recording.routed_experts, -1)), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


class TestErrors:
    def test_tables(self):
        replay = RoutingReplay(invariance.network("mixtral"))
        good = torch.zeros(1, 3, 2, 2, dtype=torch.long)
        for bad, message in (
            (good[:, :, :1], r"this model needs \(rows, tokens, 2, 2\)"),
            (good + 9, "whole numbers from -1 to 3"),
            (good.float(), "whole numbers"),
        ):
            with pytest.raises(ValueError, match=message), replay.replay(bad):
                pass
        message = r"of \(1, 3\) rows and tokens, the forward pass of \(1, 2\)"
        with pytest.raises(ValueError, match=message), replay.replay(good):
            replay.model(torch.ones(1, 2, dtype=torch.long))
        with replay.record() as recording, pytest.raises(ValueError, match="Nothing has been recorded"):
            _ = recording.routed_experts

    def test_routers_that_do_not_choose_by_topk(self):
        model = balance.model("dynamic_moe")
        with RoutingReplay(model).record(), pytest.raises(ValueError, match="does not choose its experts by one topk"):
            model(torch.ones(1, 2, dtype=torch.long))

    def test_reentrant_checkpointing(self):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            RoutingReplay(invariance.network("mixtral")).pin_recomputation(use_reentrant=True)
