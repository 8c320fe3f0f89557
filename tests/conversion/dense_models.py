"""Tiny dense sources of every family, with weights large enough that any mix-up shows in the logits."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    YoutuConfig,
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
STOCK = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
    "smollm3": SmolLM3Config,
    "phi3": Phi3Config,
    "youtu": YoutuConfig,
    "deepseek_v3": DeepseekV3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 5, "pad_token_id": 0}
OWN = {
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "smollm3": {"pad_token_id": 0, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
    "phi3": {"pad_token_id": 0},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},  # low enough to matter
    "gemma3_text": {**GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    "youtu": LATENT,
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 2, "num_mtp_layers": 0},
}


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
    centre = 0 if family.startswith("gemma") else 1  # its norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(centre + 0.2 * noise if "norm" in name else 0.3 * noise)
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
