"""How many experts a token uses, and among how many it chooses, step by step."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from hf_moe.modeling.feed_forwards.pooled_moe import PooledMoe
from hf_moe.training import PoolSchedule, TopKSchedule
from hf_moe.training.balancing import routers
from hf_moe.training.schedules import SCHEDULES

sys.path.insert(0, str(Path(__file__).parent))
import balance


def frozen(num_experts: int = 8) -> torch.nn.Module:
    feed_forward = {
        "type": "moe",
        "num_experts": num_experts,
        "router": {"type": "frozen", "top_k": 2},
        "experts": {"type": "swiglu", "intermediate_size": 8},
    }
    return balance.model("hf_moe", blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}})


def pooled() -> torch.nn.Module:
    feed_forward = {
        "type": "pooled_moe",
        "num_experts": 4,
        "layers_per_pool": 2,
        "router": {"type": "top_k", "top_k": 2},
        "experts": {"type": "swiglu", "intermediate_size": 8},
    }
    return balance.model("hf_moe", blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}})


class Watch(TrainerCallback):
    """Keeps what a part says in every step."""

    def __init__(self, read) -> None:
        self.read, self.values = read, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values += [self.read(model)]


def train(network: torch.nn.Module, callback: TrainerCallback, read, steps: int) -> list:
    watch, args = Watch(read), balance.arguments(2)
    args.max_steps = steps
    trainer = balance.Trainer(network, args, train_dataset=balance.rows(), callbacks=[callback, watch])
    trainer.train()
    return watch.values


class TestTopK:
    def test_formulas(self):
        """The published functions of t, with k from 8 to 16 over T = 400,000 steps (enwik8) as the example."""
        for t in range(0, 400_001, 1000):
            assert SCHEDULES["linear"](8, 16, t / 400_000) == round(8 * t / 400_000) + 8
            assert SCHEDULES["cosine"](8, 16, t / 400_000) == round(-8 * math.cos(math.pi * t / 800_000)) + 16
            floor = (3 * t) // 4000  # 300 t / T
            assert SCHEDULES["exponential"](8, 16, t / 400_000) == round(-8 * 0.99**floor) + 16
        assert [SCHEDULES["steps"](1, 16, t / 10) for t in range(11)] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 16]
        assert [SCHEDULES["steps"](3, 8, t / 3) for t in range(4)] == [3, 6, 8, 8]

    @pytest.mark.parametrize("kind", SCHEDULES)
    def test_they_grow_from_start_to_end(self, kind):
        values = [SCHEDULES[kind](2, 16, t / 500) for t in range(501)]
        assert values[0] == 2 and values == sorted(values) and values[-1] in (15, 16)
        assert kind == "exponential" or values[-1] == 16  # 0.99^300 is 5% short of the end

    def test_in_training(self):
        network = frozen()
        seen = train(network, TopKSchedule(start=2), lambda m: [r.top_k for r in routers(m)], 6)
        assert seen == [[k, k] for k in (2, 3, 4, 5, 6, 7)]
        assert network.config.num_experts_per_tok == 2
        seen = train(network, TopKSchedule(2, 4, "steps", num_steps=2), lambda m: next(routers(m)).top_k, 4)
        assert seen == [2, 4, 4, 4]

    def test_all_experts_are_the_dense_mixture(self):
        network, row = frozen(4).eval(), torch.arange(3, 9)[None]
        TopKSchedule(num_steps=1).on_step_begin(None, TrainerState(global_step=1, max_steps=9), None, network)
        assert [router.top_k for router in routers(network)] == [4, 4]
        layer = network.model.layers[0].mlp
        hidden = torch.randn(1, 6, network.config.hidden_size)
        weights = (hidden[0] @ layer.gate.weight.T + layer.gate.bias).softmax(-1)
        outputs = torch.stack([layer.experts(hidden[0], row.T * 0 + e, torch.ones(6, 1)) for e in range(4)], 1)
        torch.testing.assert_close(layer(hidden)[0][0], (weights[..., None] * outputs).sum(1))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"schedule='sine' is unknown; choose from \['cosine', 'exponential'"):
            TopKSchedule(schedule="sine")
        for start, end in ((0, None), (3, 2)):
            with pytest.raises(ValueError, match=f"start={start} and end={end}: the number of experts grows"):
                TopKSchedule(start, end)
        with pytest.raises(ValueError, match="start=1 and end=9 must be at most the 8 experts"):
            train(frozen(), TopKSchedule(end=9), lambda m: None, 1)
        dense = {"mixer": {"type": "attention"}, "feed_forward": {"type": "mlp", "intermediate_size": 8}}
        with pytest.raises(ValueError, match="No router of this model is 'frozen'"):
            train(balance.model("hf_moe", blocks={"b": dense}), TopKSchedule(), lambda m: None, 1)


class TestPool:
    def test_formula(self):
        """N_t of eq. 6 with N = 64, r = 4, t_s = 10,000, t_e = 30,000."""
        schedule = PoolSchedule()
        for t in range(10_000, 30_001, 500):
            expected = math.floor((1 + 3 * (t - 10_000) / 20_000) * 64 + 1e-9)
            assert schedule.num_candidates(t, 64, 256) == expected
        assert [schedule.num_candidates(t, 64, 256) for t in (0, 9999, 30_000, 10**6)] == [64, 64, 256, 256]

    def test_in_training(self):
        network = pooled()
        layers = [module for module in network.modules() if isinstance(module, PooledMoe)]
        assert len(layers) == 2
        seen = train(network, PoolSchedule(1, 5), lambda m: [layer.num_candidates for layer in layers], 7)
        assert [first for first, second in seen if first == second] == [4, 4, 5, 6, 7, None, None]

    def test_errors(self):
        for start, end in ((-1, 3), (3, 3), (4, 3)):
            with pytest.raises(ValueError, match=f"start={start} and end={end}: the pool grows"):
                PoolSchedule(start, end)
        with pytest.raises(ValueError, match="No layer of this model is a 'pooled_moe'"):
            train(frozen(), PoolSchedule(), lambda m: None, 1)
