"""Stages of the quickstart: the recipe, the dense seed, training, the mixtures, perplexity."""

import math
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ...architectures import HfMoeConfig, HfMoeForCausalLM
from ...conversion import upcycle
from .tokens import Corpus, sample

OTHER_DOMAINS = 0.1  # a specialist's tokens of the other domains, per token of its own (BAM: 10% Common Crawl)
TOP_K = 2  # feed-forward experts per token, in every mixture
ROUTING = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and learning rates. It counts steps, never seconds: a slow machine computes the same."""

    vocab_size: int = 4096
    window: int = 128  # tokens
    batch_size: int = 4  # windows per step; at this scale more steps teach more than larger ones
    held_out_windows: int = 256  # per domain, at most
    characters: int | None = None  # per domain, at most
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    seed_steps: int = 900
    branch_steps: int = 120  # per specialist
    mix_steps: int = 480
    learning_rate: float = 2e-3  # the peak of every stage
    seed_final_lr: float = 0.3  # where the seed's cosine ends, as a part of the peak: the branches go on from there
    final_lr: float = 0.1  # where all others end

    def tokens(self, steps: int) -> int:
        """Tokens that this many steps read."""
        return steps * self.batch_size * self.window


DEFAULT = Recipe()
FAST = Recipe(
    window=64,
    held_out_windows=64,
    characters=300_000,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    intermediate_size=128,
    seed_steps=60,
    branch_steps=10,
    mix_steps=20,
)


def dense_seed(recipe: Recipe, block_type: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A fresh dense model: a stock Llama for `pre_norm`, else ours with `block_type` blocks."""
    shared: dict[str, Any] = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_heads,
        "max_position_embeddings": 8 * recipe.window,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    set_seed(seed)
    if block_type == "pre_norm":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=recipe.intermediate_size, **shared))
    feed_forward = {"type": "mlp", "intermediate_size": recipe.intermediate_size}
    block = {"type": block_type, "mixer": {"type": "attention"}, "feed_forward": feed_forward}
    return HfMoeForCausalLM(HfMoeConfig(blocks={"dense": block}, **shared))


def train(model: PreTrainedModel, rows: Dataset, recipe: Recipe, seed: int, final_lr: float) -> None:
    """One pass over `rows` with Trainer, on the GPU if there is one. The same rows and seed give the same batches."""
    steps = len(rows) // recipe.batch_size
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=recipe.batch_size,
            max_steps=steps,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": final_lr},
            warmup_steps=max(1, steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator).train()


def specialist_rows(corpus: Corpus, domain: str, recipe: Recipe, seed: int) -> Dataset:
    """What a specialist reads: its domain, and a little of every other one so that it does not forget them."""
    others = [name for name in corpus.domains if name != domain]
    shares = {domain: 1 / (1 + OTHER_DOMAINS)} | {
        name: OTHER_DOMAINS / (1 + OTHER_DOMAINS) / len(others) for name in others
    }
    number = 1 + corpus.domains.index(domain)
    return sample(corpus, shares, recipe.branch_steps * recipe.batch_size, seed=1000 * seed + number)


def even_rows(corpus: Corpus, steps: int, recipe: Recipe, seed: int) -> Dataset:
    """As much of every domain."""
    shares = {domain: 1 / len(corpus.domains) for domain in corpus.domains}
    return sample(corpus, shares, steps * recipe.batch_size, seed=seed)


def join(parts: list[Dataset], seed: int) -> Dataset:
    """All rows of several data sets, shuffled."""
    return concatenate_datasets(parts).shuffle(seed=seed)


def soup(models: list[PreTrainedModel]) -> PreTrainedModel:
    """The average of the weights, in a model of the same kind."""
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name].float().cpu() for state in states]).mean(0) for name in states[0]}
    result = type(models[0])(models[0].config)
    result.load_state_dict(mean)
    return result


def mixture(kind: str, models: list[PreTrainedModel], seed: int) -> PreTrainedModel:
    """`btx`, `bam` or `bam_shared`, of the same dense models and with the same routing."""
    sources = [model.cpu() for model in models]
    options: dict[str, Any] = {"top_k": TOP_K, "seed": seed, **ROUTING}
    if kind == "btx":  # its router divides the chosen probabilities by their sum; so must BAM's
        return upcycle(sources, target="hf_moe", method="btx", **options)
    shared = kind == "bam_shared"
    return upcycle(sources, target="bam", method="bam", share_key_value=shared, normalize=True, **options)


@torch.no_grad()
def perplexities(model: PreTrainedModel, corpus: Corpus, batch_size: int = 16) -> dict[str, float]:
    """Held-out perplexity per domain, from the mean loss over all predicted tokens; no balance loss in it."""
    model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # pyright: ignore
    result = {}
    for domain, rows in corpus.held_out.items():
        total, count = 0.0, 0
        batches = rows.with_format("torch").iter(batch_size)
        for batch in tqdm(batches, f"Perplexity, {domain}", math.ceil(len(rows) / batch_size), leave=False):
            ids = batch["input_ids"].long().to(model.device)  # pyright: ignore
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
        result[domain] = math.exp(total / count)
    return result
