"""One optimizer step on eight fixed rows, by every road a user takes; what comes back is the gradient it used.

Run as a script it is one process of a data-parallel run: `torchrun --nproc-per-node 2 balance.py OUT.safetensors`.
"""

import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import hf_moe
from hf_moe.testing import tiny_config

ROWS, LENGTH = 8, 12
Gradients = dict[str, torch.Tensor]


def rows(same_tokens: bool = True, equal_labels: bool = True) -> Dataset:
    """Eight rows. The same tokens in all make the router's statistic equal in every micro-batch, so that its weight is
    what is compared; unequal labels give row i only i + 2 of them."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(ROWS):
        if i == 0 or not same_tokens:
            ids = torch.randint(3, 200, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[LENGTH if equal_labels else i + 3 :] = -100
        ones = torch.ones_like(ids)
        examples.append({"input_ids": ids.tolist(), "attention_mask": ones.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(examples)


def model(model_type: str = "rmoe", **overrides: Any) -> PreTrainedModel:
    """A tiny model whose balance losses are strong beside the cross-entropy."""
    torch.manual_seed(0)
    config = tiny_config(model_type, initializer_range=0.2, router_aux_loss_coef=1.0, **overrides)
    return hf_moe.ARCHITECTURES[model_type][2](config)


class KeepGradients(TrainerCallback):
    """Copies the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(accumulation: int, processes: int = 1, cls: type[TrainingArguments] = TrainingArguments, **extra: Any):
    """One optimizer step of plain SGD over all eight rows."""
    return cls(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,  # TRL would drop the attention mask
        **extra,
    )


def with_trainer(
    network: PreTrainedModel,
    data: Dataset,
    accumulation: int = 1,
    processes: int = 1,
    cls: type[Trainer] = Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    **extra: Any,
) -> Gradients:
    """The gradients under transformers' Trainer."""
    keep = KeepGradients()
    args = arguments(accumulation, processes, **extra)
    collate = default_data_collator
    cls(network, args, train_dataset=data, data_collator=collate, callbacks=[keep, *callbacks]).train()
    return keep.gradients


def with_trl(
    network: PreTrainedModel,
    data: Dataset,
    tokenizer: Any,
    accumulation: int = 1,
    checkpointing: bool = False,
    mixin: type = object,
    callbacks: Sequence[TrainerCallback] = (),
) -> Gradients:
    """The gradients under TRL's SFTTrainer, which never calls the model's own loss."""
    from trl import SFTConfig, SFTTrainer

    keep = KeepGradients()
    args = arguments(accumulation, cls=SFTConfig, activation_checkpointing=checkpointing, bf16=False)
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    types.new_class("Mixed", (mixin, SFTTrainer) if mixin is not object else (SFTTrainer,))(
        network,
        args,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[keep, *callbacks],
        processing_class=tokenizer,
    ).train()
    return keep.gradients


def by_hand(network: PreTrainedModel, data: Dataset) -> Gradients:
    """The gradients of a bare PyTorch loop over one batch."""
    batch = default_data_collator(list(data))
    network.train()
    network(**batch, use_cache=False).loss.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gradients = with_trainer(model(), rows(equal_labels=False), accumulation=2, processes=2)
    if torch.distributed.get_rank() == 0:
        save_file({name.removeprefix("module."): g.contiguous() for name, g in gradients.items()}, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
