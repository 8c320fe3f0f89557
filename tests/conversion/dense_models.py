"""Tiny dense sources of every family, with weights large enough that any mix-up shows in the logits."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import hf_moe

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STOCK = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
OWN = {"qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 5}}


def dense_config(family: str, **overrides: Any) -> Any:
    """A config of a family: a stock one, `hf_moe` (one dense block) or `parallel` (hf_moe with parallel blocks)."""
    fields = {**SIZES, **OWN.get(family, {}), **overrides}
    if family in STOCK:
        return STOCK[family](**fields)
    feed_forward = {"type": "mlp", "intermediate_size": fields.pop("intermediate_size")}
    mixer = {"type": "attention", **fields.pop("mixer", {})}
    block_type = "parallel" if family == "parallel" else "pre_norm"
    blocks = {"dense": {"type": block_type, "mixer": mixer, "feed_forward": feed_forward}}
    return hf_moe.HfMoeConfig(blocks=blocks, **fields)


def dense_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of a family; norms and biases are random too."""
    model = AutoModelForCausalLM.from_config(dense_config(family, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


def dense_models(family: str, count: int = 3, **overrides: Any) -> list[PreTrainedModel]:
    """Several different models of one shape."""
    return [dense_model(family, seed, **overrides) for seed in range(count)]


def token_ids(batch: int = 2, time: int = 11) -> torch.Tensor:
    """Some tokens of the tiny vocabulary."""
    return torch.randint(3, SIZES["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says about those tokens."""
    return model.eval()(token_ids(), use_cache=False).logits


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """A word-level tokenizer; the unknown word is number 0."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
