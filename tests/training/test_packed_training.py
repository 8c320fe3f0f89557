"""Rows that trainers pack train like the separate sequences, in a stack of recurrences and attention."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import hf_moe

sys.path.insert(0, str(Path(__file__).parent))
import balance

LENGTHS = (7, 12, 4, 9, 5)


def model() -> PreTrainedModel:
    """Six layers of six kinds, without a balance loss, whose statistics packing changes."""
    mixers = [
        {"type": "gated_delta_net", "num_heads": 2},
        {"type": "attention"},
        {"type": "mamba2", "head_dim": 16, "state_size": 8},
        {"type": "lightning_attention"},
        {"type": "attention", "sliding": True},
        {"type": "kimi_delta_attention", "num_heads": 2},
    ]
    mlp = {"type": "mlp", "intermediate_size": 32}
    blocks = {f"{i}": {"mixer": mixer, "feed_forward": mlp} for i, mixer in enumerate(mixers)}
    torch.manual_seed(0)
    return hf_moe.HfMoeForCausalLM(
        hf_moe.HfMoeConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=6,
            num_attention_heads=4,
            blocks=blocks,
            sliding_window=3,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 99, (length,), generator=generator).tolist() for length in LENGTHS]


def separate() -> tuple[torch.Tensor, balance.Gradients]:
    """The mean loss over all labels, one sequence at a time, and its gradient."""
    network, total = model().train(), sum(length - 1 for length in LENGTHS)
    losses = []
    for ids in sequences():
        row = torch.tensor([ids])
        losses.append(network(row, labels=row, num_items_in_batch=total).loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def same(actual: balance.Gradients, expected: balance.Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("flash", [False, True], ids=["positions", "flash-arguments"])
def test_flattening_collator(flash):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash, return_tensors="pt")
    batch = collate([{"input_ids": ids} for ids in sequences()])
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and ("cu_seq_lens_q" in batch) == flash
    network = model().train()
    loss = network(**batch).loss
    loss.backward()
    expected_loss, expected = separate()
    torch.testing.assert_close(loss.detach(), expected_loss)
    same({name: p.grad for name, p in network.named_parameters()}, expected)


# TRL's advice to use flash attention, and its alignment of the ids of special tokens
@pytest.mark.allow_warnings("flash", "PAD/BOS/EOS")
@pytest.mark.parametrize("packing", [True, False], ids=["packing", "padding-free"])
def test_trl(packing, tokenizer):
    keep, data = balance.KeepGradients(), Dataset.from_list([{"input_ids": ids} for ids in sequences()])
    args = balance.arguments(
        1,
        cls=SFTConfig,
        packing=packing,
        padding_free=True,
        max_length=64 if packing else None,
        activation_checkpointing=False,
        bf16=False,
    )
    network = model()
    trainer = SFTTrainer(network, args, train_dataset=data, callbacks=[keep], processing_class=tokenizer)
    trainer.train()
    same(keep.gradients, separate()[1])
