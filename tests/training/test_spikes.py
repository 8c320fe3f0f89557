"""Steps that spike change nothing; the rule is mean + 6 standard deviations of the last 128 steps."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

from hf_moe.training import SkipsSpikes, SpikeSkipping

sys.path.insert(0, str(Path(__file__).parent))
import balance


class Spikes(TrainerCallback):
    """Multiplies the gradients of some steps, and keeps the weights after each step."""

    def __init__(self, steps: dict[int, float]) -> None:
        self.steps, self.weights, self.handles, self.step = steps, [], [], 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.handles = [p.register_hook(self.scale) for p in model.parameters()]

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def scale(self, grad):
        return grad * self.steps.get(self.step, 1.0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.lm_head.weight.detach().clone())


class SkippingTrainer(SkipsSpikes, Trainer):
    pass


def run(folder, spikes: Spikes, steps: int = 10, resume: str | None = None, cls=SkippingTrainer, **extra) -> Trainer:
    args = balance.arguments(4)
    args.output_dir, args.max_steps, args.save_strategy, args.save_steps = str(folder), steps, "steps", 6
    args.max_grad_norm, args.logging_steps, args.optim, args.learning_rate = 1.0, 1, "adamw_torch", 1e-3
    args.weight_decay = 0.1
    callbacks = [spikes, SpikeSkipping(window=8, min_steps=4, **extra)]
    network, data = balance.model("rmoe"), balance.rows(same_tokens=False)
    trainer = cls(network, args, balance.default_data_collator, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_skips_and_resumes(tmp_path):
    """Clipping hides a spike's size from the optimizer but not from the rule; a resumed run decides alike."""
    spikes = Spikes({1: 1e3, 7: 1e3, 8: math.inf})
    whole = run(tmp_path, spikes)
    weights = spikes.weights
    still = [i for i in range(1, 10) if torch.equal(weights[i], weights[i - 1])]
    assert still == [8]  # step 1 came too early to be judged, and is in the window of step 7
    assert whole.spike_skipping.skipped == still
    assert [e["skipped_steps"] for e in whole.state.log_history if "loss" in e][-1] == len(still)
    resumed = run(tmp_path, Spikes(spikes.steps), resume=str(tmp_path / "checkpoint-6"))
    assert resumed.spike_skipping.skipped == still
    assert resumed.spike_skipping.norms == whole.spike_skipping.norms and len(whole.spike_skipping.norms) == 8
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path):
    """Moments and weight decay too: the next step is that of a run whose spiking step never came."""
    spikes = Spikes({7: 1e3})
    trainer = run(tmp_path, spikes)
    assert trainer.spike_skipping.skipped == [7]
    assert torch.equal(spikes.weights[7], spikes.weights[6]) and not torch.equal(spikes.weights[8], spikes.weights[7])
    assert {int(state["step"]) for state in trainer.optimizer.optimizer.state.values()} == {9}
    found = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[7] > 100 * found[6]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.1, 10) | st.sampled_from([1e3, math.nan, math.inf]), min_size=1, max_size=30),
    st.integers(2, 6),
)
def test_rule(values, window):
    """Against the definition: the last `window` finite values, the present one not among them."""
    callback = SpikeSkipping(sigmas=2.0, window=window, min_steps=2)
    for step, value in enumerate(values):
        past = torch.tensor([v for v in values[:step] if math.isfinite(v)][-window:], dtype=torch.float64)
        spike = not math.isfinite(value) or (len(past) >= 2 and value > past.mean() + 2 * past.std())
        near = len(past) >= 2 and abs(value - past.mean() - 2 * past.std()) < 1e-9
        assert callback.is_spike(step, 1.0, value) == spike or near
    again = SpikeSkipping.from_state(callback.state())
    assert again.norms == callback.norms and again.skipped == callback.skipped


def test_losses_count_too():
    callback = SpikeSkipping(window=4)
    assert [callback.is_spike(i, loss, 1.0) for i, loss in enumerate([1, 2, 1, 2, 50, 2])] == [False] * 4 + [
        True,
        False,
    ]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"min_steps=9 from 2 to the window"):
        SpikeSkipping(window=8, min_steps=9)
    with pytest.raises(ValueError, match="needs its mixin"):
        run(tmp_path, Spikes({}), steps=1, cls=Trainer)
