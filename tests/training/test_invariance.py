"""`LoadBalancing` gives the gradient of the formula over the whole step, however it is cut, padded or packed."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import balance
import invariance

KINDS = [*invariance.NATIVE, *invariance.OWN]


def same(actual: balance.Gradients, expected: balance.Gradients, tolerance: float = 2e-5) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def expected():
    return functools.cache(invariance.by_formula)


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer(kind, accumulation, expected):
    same(invariance.with_trainer(kind, accumulation), expected(kind))


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_with_packing(kind, accumulation, expected, tokenizer):
    same(invariance.with_packing(kind, tokenizer, accumulation), expected(kind))


def test_two_processes(tmp_path, expected):
    out = tmp_path / "results.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", invariance.__file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in [*KINDS, "bias", "distilled", "measured"]}
    for name, tensor in load_file(out).items():
        kind, _, rest = name.partition("/")
        results[kind][rest] = tensor
    for kind in KINDS:
        same(results[kind], expected(kind))
    for kind, alone in (("distilled", invariance.distilled()), ("measured", invariance.measured())):
        assert alone.keys() == results[kind].keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(results[kind][name], tensor, atol=2e-5, rtol=1e-4, msg=f"{kind} {name}")
    whole, start = invariance.biases(), dict(invariance.network("deepseek_v3").named_buffers())
    assert whole
    for name, bias in whole.items():
        moved = bias - start[name]
        assert moved.abs().sum() > 0 and moved.sum().abs() < 1e-5  # zero mean
    for results_here in (results["bias"], invariance.biases(4), invariance.biases(8)):
        assert all(torch.equal(results_here[name], bias) for name, bias in whole.items())


@pytest.mark.parametrize("loss", ["switch", "sequence", "importance"])
def test_without_the_mixin_the_coefficient_keeps_its_size(loss):
    """With equal rows the statistic of every micro-batch is the same, so that its weight is what is compared."""
    one, four, eight = (
        balance.with_trainer(
            invariance.network("qwen3_moe"),
            balance.rows(equal_labels=False),
            accumulation,
            callbacks=[invariance.LoadBalancing(loss, 30.0)],
        )
        for accumulation in (1, 4, 8)
    )
    assert one["model.layers.1.mlp.gate.weight"].norm() > 0.1
    same(four, one)
    same(eight, one)


@pytest.mark.allow_warnings("new PAD/BOS/EOS tokens")
def test_the_models_own_term_is_replaced(tokenizer):
    """Transformers' term grows with the micro-batches; ours stays, also where the model computes its own as well."""
    gate, settings = "model.layers.1.mlp.gate.weight", {"output_router_logits": True, "router_aux_loss_coef": 30.0}

    def norm(accumulation: int, ours: bool) -> float:
        model = invariance.network("qwen3_moe")
        for name, value in settings.items():
            setattr(model.config, name, value)
        model.router_aux_loss_coef = settings["router_aux_loss_coef"]
        callbacks = [invariance.LoadBalancing("sequence", 0.0)] if ours else []
        return balance.with_trainer(model, invariance.padded(), accumulation, callbacks=callbacks)[gate].norm().item()

    assert norm(8, ours=False) > 3 * norm(1, ours=False)  # the fault of today's stack
    none = balance.with_trainer(invariance.network("qwen3_moe"), invariance.padded())[gate].norm().item()
    assert norm(1, ours=True) == pytest.approx(none, rel=1e-4) == norm(8, ours=True)
    assert norm(1, ours=False) > 3 * none
    trl = invariance.network("qwen3_moe")  # SFTTrainer switches Mixtral's term on by itself
    trl.config.router_aux_loss_coef = 30.0
    quiet = balance.with_trl(trl, invariance.padded(), tokenizer, callbacks=[invariance.LoadBalancing("switch", 0.0)])
    assert quiet[gate].norm().item() == pytest.approx(none, rel=1e-4)


def test_every_hook_is_taken_off():
    model = invariance.network("mixtral")
    balance.with_trainer(model, invariance.padded(), callbacks=[invariance.LoadBalancing()])
    assert not any(m._forward_hooks for n, m in model.named_modules() if n.endswith("gate"))
    assert not model._forward_pre_hooks and not model.model._forward_pre_hooks


@pytest.mark.parametrize(
    "kind", [{"use_reentrant": True}, {"use_reentrant": False}], ids=["reentrant", "non-reentrant"]
)
def test_checkpointing(kind, expected):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kind}
    model = invariance.network("olmoe")
    balancing = invariance.LoadBalancing("global", invariance.COEF)
    found = balance.with_trainer(
        model, invariance.padded(), 4, cls=invariance.CountsAhead, callbacks=[balancing], **settings
    )
    same(found, expected("olmoe"))


class TestErrors:
    def test_fp16_is_refused(self):
        args = balance.arguments(1)
        args.fp16 = True
        with pytest.raises(ValueError, match="train with bf16=True"):
            invariance.LoadBalancing().on_train_begin(args, None, None, invariance.network("mixtral"))

    def test_negative_coefficients(self):
        with pytest.raises(ValueError, match=r"z_loss_coef=-1 must be at least 0"):
            invariance.LoadBalancing("switch", 0.1, -1)


@pytest.mark.allow_warnings("")  # families tell about their own missing kernels
@pytest.mark.parametrize("kind", ["llama4", "gemma4", "deepseek_v4", "cohere2_moe"])
def test_gates_of_their_own_kind(kind):
    """The gradient of the balance loss goes through whatever a gate returns; looked-up choices have none."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
    from native_models import tiny_native

    from hf_moe.modeling import watch_routers
    from hf_moe.training import LoadBalancing

    def network():
        return tiny_native(kind, vocab_size=256).train()

    data, calls, reference = balance.rows(), [], network()
    torch.manual_seed(1)
    actual = balance.with_trainer(network(), data, callbacks=[LoadBalancing("switch", 0.7)])
    watch_routers(reference, calls.append)
    torch.manual_seed(1)
    batch = balance.default_data_collator(list(data))
    total = reference(**batch, use_cache=False).loss
    for call in calls:
        if call.layer.learns_choice:
            own = call.gate.score_fn(call.logits) if call.layer.scoring == "score_fn" else call.logits.softmax(-1)
            values = call.logits.sigmoid() if call.layer.scoring == "sigmoid" else own
            shares = values / values.sum(-1, keepdim=True)
            counts = torch.bincount(call.indices.flatten(), minlength=shares.shape[1])
            total = total + 0.7 * shares.shape[1] * (counts / counts.sum() * shares.mean(0)).sum()
    total.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-5, rtol=1e-3, msg=name)
