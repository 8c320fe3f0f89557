"""The balance gradient in TRL's trainers with losses of their own: what it adds is the formula's, and nothing else."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_moe.modeling import watch_routers
from hf_moe.training import LoadBalancing

sys.path.insert(0, str(Path(__file__).parent))
import balance
import invariance

COEF = 0.7
WORDS = ["<pad>", "<s>", "</s>", *"abcdefgh"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **specials)


class Passes(TrainerCallback):
    """What the decoder was called with in passes that train."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.base_model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, decoder, args, kwargs):
        if decoder.training and torch.is_grad_enabled():
            names = ("input_ids", "attention_mask", "position_ids")
            self.inputs.append({name: kwargs[name].clone() for name in names if kwargs.get(name) is not None})


def arguments(cls: Any, **extra: Any) -> Any:
    made = balance.arguments(4, cls=cls, bf16=False, activation_checkpointing=False, **extra)
    made.gradient_accumulation_steps = 1
    return made


def dpo(callbacks: list) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "a b", "chosen": "c d e", "rejected": "e"}, {"prompt": "b", "chosen": "a", "rejected": "d d"}]
    args = arguments(DPOConfig, router_aux_loss_coef=0.0)
    student, reference = invariance.network("qwen3_moe"), invariance.network("qwen3_moe")
    DPOTrainer(
        student,
        reference,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
    ).train()


def grpo(callbacks: list) -> None:
    from trl import GRPOConfig, GRPOTrainer

    args = arguments(GRPOConfig, router_aux_loss_coef=0.0, num_generations=2, max_completion_length=4, beta=0.0)
    reward = lambda completion_ids, **kwargs: [float(len(set(ids))) for ids in completion_ids]  # noqa: E731
    data = Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d"}] * 8)
    model = invariance.network("qwen3_moe")
    GRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks).train()


def distillation(callbacks: list) -> None:
    from trl import DistillationConfig, DistillationTrainer

    args = arguments(DistillationConfig, max_completion_length=4)
    data = Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d"}] * 2)
    student, teacher = invariance.network("qwen3_moe"), invariance.network("mixtral")
    DistillationTrainer(
        student, teacher, args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks
    ).train()


@pytest.mark.allow_warnings("")  # TRL tells about its own options and tokens
@pytest.mark.parametrize("train", [dpo, grpo, distillation], ids=lambda f: f.__name__)
def test_what_is_added_is_the_formula(train):
    found = {}
    for coef in (0.0, COEF):
        keep, passes = balance.KeepGradients(), Passes()
        train([keep, passes, LoadBalancing("switch", coef)])
        found[coef] = keep.gradients, passes.inputs
    (without, _), (balanced, inputs) = found[0.0], found[COEF]
    assert inputs
    reference, calls = invariance.network("qwen3_moe"), []
    watch_routers(reference, calls.append)
    for batch in inputs:
        reference(**batch, use_cache=False)
    total = 0.0
    for call in calls:
        real = slice(None) if call.token_mask is None else call.token_mask
        shares, chosen = call.logits.softmax(-1)[real], call.indices[real]
        counts = torch.bincount(chosen.flatten(), minlength=shares.shape[1])
        total = total + COEF * shares.shape[1] * (counts / counts.sum() * shares.mean(0)).sum()
    total.backward()
    added = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert any(name.endswith("gate.weight") and gradient.abs().max() > 1e-4 for name, gradient in added.items())
    for name, gradient in balanced.items():
        expected = without[name] + added.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-3, msg=name)
