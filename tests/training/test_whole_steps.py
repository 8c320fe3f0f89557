"""What is balanced over a whole optimizer step does not depend on how trainers cut it: loads, biases, global loss."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig, TrainerCallback

from hf_moe.modeling.losses import BALANCE_LOSSES
from hf_moe.modeling.routers import base
from hf_moe.training import (
    BiasBalancing,
    CountsAhead,
    LoadBalancing,
    PoolSchedule,
    TopKSchedule,
    count_ahead,
    empty_loads,
    update_biases,
)
from hf_moe.training.balancing import routers

sys.path.insert(0, str(Path(__file__).parent))
import balance
import steps
import test_resume

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


def checkpointing(kind: dict | None) -> dict:
    return {} if kind is None else {"activation_checkpointing": True, "activation_checkpointing_kwargs": kind}


def same(actual: balance.Gradients, expected: balance.Gradients, tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def expected_gradients() -> balance.Gradients:
    """Of the Switch loss over one batch of all rows."""
    return balance.by_hand(steps.model(), balance.rows(same_tokens=False))


@pytest.fixture(scope="module")
def expected_biases() -> dict[str, torch.Tensor]:
    """Counted by hand from what a forward pass over all rows chooses."""
    network, batch = steps.model().eval(), balance.default_data_collator(list(steps.padded_rows()))
    logits = network(batch["input_ids"], batch["attention_mask"], output_router_logits=True).router_logits
    expected = {}
    for name, layer in zip(steps.biases(network), logits):
        counts = [0.0] * 4
        for real, row in zip(batch["attention_mask"].flatten(), layer.sigmoid()):
            for expert in row.topk(steps.TOP_K).indices.tolist():
                counts[expert] += real.item()
        expected[name] = steps.RATE * torch.tensor([sum(counts) / 4 - count for count in counts]).sign()
    assert all(bias.abs().sum() > 0 for bias in expected.values())
    return expected


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4, 8])
class TestOneProcess:
    def test_global_loss_counted_ahead_is_that_of_the_whole_batch(self, accumulation, kind, expected_gradients):
        same(steps.global_gradients(accumulation, **checkpointing(kind)), expected_gradients)

    def test_biases_move_once_by_the_counts_of_all_rows(self, accumulation, kind, expected_biases):
        assert_equal(steps.biased(accumulation, **checkpointing(kind)), expected_biases)


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], bias) for name, bias in expected.items())


def test_two_processes(tmp_path, expected_gradients, expected_biases):
    out = tmp_path / "results.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", steps.__file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, torch.Tensor]] = {"ahead": {}, "whole": {}, "bias": {}}
    for name, tensor in load_file(out).items():
        kind, _, rest = name.partition("/")
        results[kind][rest] = tensor
    same(results["ahead"], expected_gradients)
    same(results["whole"], expected_gradients)  # without accumulation nothing has to be counted ahead
    assert_equal(results["bias"], expected_biases)


def test_the_sequence_loss_is_exactly_invariant():
    """It looks at one row at a time."""
    settings = {"router_balance_loss": "sequence"}
    expected = balance.by_hand(steps.model(**settings), balance.rows(same_tokens=False))
    for accumulation in (1, 4, 8):
        same(balance.with_trainer(steps.model(**settings), balance.rows(same_tokens=False), accumulation), expected)


@pytest.mark.parametrize("loss", sorted(BALANCE_LOSSES))
def test_every_loss_trains(loss):
    """And is what the config says: its gradient is its own."""
    gradients = balance.with_trainer(
        steps.model(), balance.rows(same_tokens=False), 2, callbacks=[LoadBalancing(loss)]
    )
    without = steps.model()
    without.config.router_aux_loss_coef = 0.0
    plain = balance.with_trainer(without, balance.rows(same_tokens=False), 2)
    name = "model.layers.0.mlp.gate.weight"
    assert torch.isfinite(gradients[name]).all() and (gradients[name] - plain[name]).norm() > 1e-3


def test_running_counts_are_nearer_to_the_whole_batch_than_those_of_a_micro_batch(expected_gradients):
    micro = balance.with_trainer(steps.model(), balance.rows(same_tokens=False), 8)
    running = steps.global_gradients(8, ahead=False)
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"):
        errors = [(found[name] - expected_gradients[name]).norm().item() for found in (running, micro)]
        assert 1e-4 < errors[0] < errors[1]


def test_running_counts_by_hand():
    """The second micro-batch is compared with the loads of both; the next step begins anew."""
    network = steps.model(router_balance_loss="global").train()
    first, second = torch.randint(3, 200, (2, 1, 12), generator=torch.Generator().manual_seed(0))
    network(first, use_cache=False)
    running = network(second, use_cache=False).aux_loss
    together = [router.loads for router in routers(network)]
    assert all(loads.sum() == 2 * 12 * steps.TOP_K for loads in together)
    empty_loads(network)
    count_ahead(network, [{"input_ids": row, "use_cache": False} for row in (first, second)])
    assert all(torch.equal(router.loads, loads) for router, loads in zip(routers(network), together))
    torch.testing.assert_close(network(second, use_cache=False).aux_loss, running)
    empty_loads(network)
    alone = network(second, use_cache=False).aux_loss
    assert not torch.allclose(alone, running, atol=1e-4)
    network.config.router_balance_loss = "switch"
    torch.testing.assert_close(network(second, use_cache=False).aux_loss, alone)


def test_counting_ahead_draws_what_the_training_pass_draws():
    torch.manual_seed(0)
    network, row = steps.model(attention_dropout=0.5).train(), torch.arange(3, 15)[None]
    state = torch.get_rng_state()
    count_ahead(network, [{"input_ids": row, "use_cache": False}] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    ahead = [router.loads for router in routers(network)]
    empty_loads(network)
    for _ in range(2):
        network(row, use_cache=False)
    assert all(torch.equal(router.loads, loads) for router, loads in zip(routers(network), ahead))


def test_evaluation_does_not_count():
    network, row = steps.model().eval(), torch.arange(3, 15)[None]
    before = steps.biases(network)
    network(row, output_router_logits=True)
    assert all(router.loads is None for router in routers(network))
    update_biases(network)
    assert_equal(steps.biases(network), before)


class Watch(TrainerCallback):
    """Keeps every step's assignments."""

    def __init__(self) -> None:
        self.counts: list[float] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.counts += [next(routers(model)).loads.sum().item()]


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["plain", "reentrant", "non-reentrant"])
def test_each_step_counts_its_own_tokens_once(tmp_path, kind):
    watch = Watch()
    callbacks = [LoadBalancing(), BiasBalancing(), watch]
    # four steps of two rows, evaluations between them
    run = test_resume.trainer(steps.model(), tmp_path, callbacks, **checkpointing(kind))
    run.train()
    assert watch.counts == [2 * balance.LENGTH * steps.TOP_K] * 4
    assert all(router.loads is None for router in routers(run.model))


@pytest.mark.allow_warnings("missing keys in the checkpoint model loaded: ['lm_head.weight']")  # tied: any such model
def test_resume_restores_the_biases(tmp_path):
    callbacks = [BiasBalancing(lambda step: 0.01 / (step + 1)), LoadBalancing()]
    whole = test_resume.trainer(steps.model(), tmp_path, callbacks)
    whole.train()
    network = steps.model()
    for tensor in network.state_dict().values():
        tensor += 0.1  # whatever is not restored shows
    resumed = test_resume.trainer(network, tmp_path, callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(bias.abs().sum() > 0.01 for bias in steps.biases(whole.model).values())
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name


class TestBuffer:
    def test_fp32_survives_every_conversion(self, tmp_path):
        network = steps.model()
        for number, router in enumerate(routers(network)):
            router.e_score_correction_bias += 1 + 0.001 * torch.arange(number, number + 4)
        expected = steps.biases(network)
        network.save_pretrained(tmp_path)
        loaded = type(network).from_pretrained(tmp_path, dtype=torch.bfloat16)
        for changed in (loaded, network.to(torch.bfloat16), loaded.half()):
            assert changed.lm_head.weight.dtype != torch.float32
            assert_equal(steps.biases(changed), expected)
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        assert_equal(steps.biases(type(network).from_pretrained(again)), expected)

    def test_it_is_saved_but_no_parameter(self):
        network = steps.model()
        names = [f"{name}.e_score_correction_bias" for name in steps.biases(network)]
        assert len(names) == 2 and set(names) <= network.state_dict().keys()
        assert not set(names) & dict(network.named_parameters()).keys()

    def test_bf16_steps_add_up(self):
        """A hundred steps of 0.001 in bf16 would stop at 0.25."""
        network = steps.model().to(torch.bfloat16).train()
        router = next(routers(network))
        router.e_score_correction_bias += torch.tensor([1.0, 0, 0, 0])
        for _ in range(100):
            router.loads = torch.tensor([9.0, 1, 1, 1])
            update_biases(network, 1e-3)
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.9, 0.1, 0.1, 0.1]))


def native() -> torch.nn.Module:
    """Transformers' DeepSeek-V3: a dense layer, then a sparse one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    attention = {
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "q_lora_rank": None,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    config = DeepseekV3Config(**sizes, **attention, **heads, **experts, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["plain", "reentrant", "non-reentrant"])
def test_transformers_own_deepseek(kind):
    network, batch = native().eval(), balance.default_data_collator(list(steps.padded_rows()))
    gate = network.model.layers[1].mlp.gate
    chosen = []
    hook = gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    network(batch["input_ids"], batch["attention_mask"])
    hook.remove()
    counts = torch.bincount(chosen[0][batch["attention_mask"].flatten() == 1].flatten(), minlength=8).float()
    assert counts.sum() == 2 * batch["attention_mask"].sum() and counts.std() > 0
    for accumulation in (1, 4):
        network, callback = native(), BiasBalancing(8.0, "proportional")
        balance.with_trainer(network, steps.padded_rows(), accumulation, callbacks=[callback], **checkpointing(kind))
        gate = network.model.layers[1].mlp.gate
        torch.testing.assert_close(gate.e_score_correction_bias, 1 - 8 * counts / counts.sum())
        assert not gate._forward_hooks and callback.native is None


def test_longcat_in_training():
    """Tokens come to use as many true experts as they are told to."""
    network, callback = steps.model(zero_experts=2), BiasBalancing(0.5, "true_experts", num_true_experts=1)
    data, watch = balance.rows(same_tokens=False), Loads()
    args = balance.arguments(2, learning_rate=1e-3)
    args.max_steps = 40
    balance.Trainer(network, args, train_dataset=data, callbacks=[callback, watch]).train()
    true = torch.stack(watch.loads)[:, :4].sum(-1) / torch.stack(watch.loads).sum(-1) * steps.TOP_K
    assert true[-10:].mean().item() == pytest.approx(1, abs=0.06) and abs(true[0].item() - 1) > 0.15
    assert all(bias[4:].abs().sum() == 0 for bias in steps.biases(network).values())


class Loads(TrainerCallback):
    """Keeps every step's loads of the first layer."""

    def __init__(self) -> None:
        self.loads: list[torch.Tensor] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.loads += [next(routers(model)).loads]


def test_who_never_empties_is_warned(monkeypatch):
    monkeypatch.setattr(base, "MANY_CALLS", 3)
    network, row = steps.model().train(), torch.arange(3, 9)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(row, use_cache=False)
        network(row, use_cache=False)
        with pytest.raises(UserWarning, match="BiasBalancing"):
            network(row, use_cache=False)


class TestErrors:
    def test_controllers(self):
        with pytest.raises(ValueError, match=r"controller='pid' is unknown; choose from \['inverse', 'inverse_sqrt'"):
            BiasBalancing(controller="pid")
        with pytest.raises(ValueError, match="belong together"):
            BiasBalancing(num_true_experts=2)
        with pytest.raises(ValueError, match="belong together"):
            BiasBalancing(controller="true_experts")
        with pytest.raises(ValueError, match=r"loss='micro' is unknown; choose from \['averaged_null'"):
            LoadBalancing("micro")

    def test_models_that_cannot(self):
        for callback, message in (
            (BiasBalancing(), "selection_bias=True"),
            (PoolSchedule(), "pooled_moe"),
            (TopKSchedule(), "No router of this model is 'frozen'"),
        ):
            with pytest.raises(ValueError, match=message):
                balance.with_trainer(balance.model("rmoe"), balance.rows(), callbacks=[callback])
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
        with pytest.raises(ValueError, match="MoE layers of 'llama' are not known; choose from our own types and"):
            balance.with_trainer(dense, balance.rows(), callbacks=[LoadBalancing()])
        with pytest.raises(ValueError, match="num_true_experts=1 must lie between"):
            callback = BiasBalancing(controller="true_experts", num_true_experts=1)
            balance.with_trainer(native(), balance.rows(), callbacks=[callback])
        mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
        with pytest.raises(ValueError, match="No router of MixtralForCausalLM has a selection bias"):
            balance.with_trainer(mixtral, balance.rows(), callbacks=[BiasBalancing()])
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
        with pytest.raises(ValueError, match="MoE layers of 'llama' are not known; choose from our own types and"):
            balance.with_trainer(dense, balance.rows(), callbacks=[BiasBalancing()])
        for number, zero in ((1, 0), (2, 2), (0, 2)):
            callback = BiasBalancing(controller="true_experts", num_true_experts=number)
            with pytest.raises(ValueError, match=f"num_true_experts={number} must lie between 0 and the 2 experts"):
                balance.with_trainer(steps.model(zero), balance.rows(), callbacks=[callback])


def test_trl_takes_the_mixin(expected_gradients, tokenizer):
    data, callbacks = balance.rows(same_tokens=False), [LoadBalancing()]
    for checkpointed in (False, True):
        actual = balance.with_trl(steps.model(), data, tokenizer, 4, checkpointed, CountsAhead, callbacks)
        same(actual, expected_gradients, 1e-5)
