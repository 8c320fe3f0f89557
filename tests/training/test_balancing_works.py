"""A router that collapses onto two of eight experts: every balancing method spreads the load, nothing else does."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig, Trainer, TrainerCallback

from hf_moe import moe_layers
from hf_moe.modeling import watch_routers
from hf_moe.modeling.controllers import max_violation
from hf_moe.testing import tiny_config
from hf_moe.training import BiasBalancing, LoadBalancing

sys.path.insert(0, str(Path(__file__).parent))
import balance

EXPERTS, TOP_K, WIDTH, VOCABULARY, WINDOW = 8, 2, 32, 64, 10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
}


def qwen() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, head_dim=16))


def deepseek() -> torch.nn.Module:
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None}
    routing = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES, **latent, **routing))


def ours() -> torch.nn.Module:
    router = {"type": "top_k", "top_k": TOP_K, "selection_bias": True}
    experts = {"type": "swiglu", "intermediate_size": 16}
    moe = {"type": "moe", "num_experts": EXPERTS, "router": router, "experts": experts}
    blocks = {"moe": {"mixer": {"type": "attention"}, "feed_forward": moe}}
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": WIDTH,
        "vocab_size": VOCABULARY,
        "block_pattern": ["moe"],
        "initializer_range": 0.02,
    }
    return AutoModelForCausalLM.from_config(tiny_config("hf_moe", blocks=blocks, router_aux_loss_coef=0.0, **sizes))


def skewed(make) -> torch.nn.Module:
    """All tokens share a direction, and two experts are liked for it."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.2 / model.get_input_embeddings().weight.std())
        model.get_input_embeddings().weight[:, 0] = 2.0
        for layer in moe_layers(model):
            weight = next(layer.gate.parameters())
            weight.normal_(std=0.1)
            weight[:, 0] = torch.tensor([1.0, 0.9] + [0.0] * (EXPERTS - 2))
    return model


def text() -> Dataset:
    """A Zipf distribution of tokens, each followed by one of two."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, VOCABULARY - 3).float()
    rows = torch.multinomial(frequencies.expand(64, -1), 32, replacement=True, generator=generator) + 3
    rows[:, 1::2] = (rows[:, 0::2] * 7) % (VOCABULARY - 3) + 3
    ids = rows.tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


class Violation(TrainerCallback):
    """MaxVio of every ten steps; the run ends once it is below 0.5."""

    def __init__(self) -> None:
        self.loads, self.found = torch.zeros(EXPERTS), []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        watch_routers(model, self.count)

    def count(self, call) -> None:
        self.loads += torch.bincount(call.indices.flatten(), minlength=EXPERTS)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % WINDOW == 0:
            self.found.append(max_violation(self.loads).item())
            self.loads.zero_()
            control.should_training_stop = self.found[-1] < 0.5


def violations(make, *callbacks: TrainerCallback) -> list[float]:
    watch = Violation()
    args = balance.arguments(1, learning_rate=1e-3, seed=0)
    args.max_steps, args.optim, args.max_grad_norm = 300, "adamw_torch", 1.0
    Trainer(skewed(make), args, train_dataset=text(), callbacks=[*callbacks, watch]).train()
    return watch.found


@pytest.mark.parametrize("make", [qwen, deepseek, ours])
def test_without_balancing_it_stays_collapsed(make):
    found = violations(make)
    assert len(found) == 300 // WINDOW and min(found) > 1.5, found


@pytest.mark.parametrize(
    "make,method",
    [
        (qwen, LoadBalancing("switch", 0.05)),
        (qwen, LoadBalancing("global", 0.05)),
        (qwen, LoadBalancing("sequence", 0.05)),
        (qwen, LoadBalancing("score_importance", 0.1)),
        (deepseek, BiasBalancing(0.01)),
        (deepseek, BiasBalancing(0.01, "sign_zero_mean")),
        (deepseek, BiasBalancing(0.1, "proportional")),
        (ours, BiasBalancing(0.01)),
        (ours, LoadBalancing("switch", 0.05)),
    ],
    ids=lambda value: getattr(value, "loss", getattr(value, "controller", getattr(value, "__name__", None))),
)
def test_every_method_spreads_the_load(make, method):
    found = violations(make, method)
    assert found[-1] < 0.5 < 1.5 < found[0], found
