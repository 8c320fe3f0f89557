"""Tiny mixtures and one adapter of every kind; as a script, loads saved adapters in a process of its own.

`python adapters.py FOLDER`: for each `<kind>.safetensors` (tokens and expected logits) loads base and adapter.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedModel

from hf_moe.testing import tiny_config
from hf_moe.tuning import (
    EsftConfig,
    HydraLoraConfig,
    MixLoraConfig,
    MolaConfig,
    PstConfig,
    RamtConfig,
    ScalearnConfig,
    SmoraConfig,
    lora_config,
)
from hf_moe.tuning.expert_subset import expert_modules
from hf_moe.tuning.mix_lora import feed_forwards

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
from mixture_models import STOCK, mixture_model

OURS = ["hf_moe", "rmoe"]


def base(kind: str = "qwen3_moe") -> PreTrainedModel:
    """A tiny mixture, native or ours, or a dense Llama."""
    if kind in STOCK:
        return mixture_model(kind, num_hidden_layers=2)
    torch.manual_seed(0)
    if kind == "gpt_oss":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads))
    elif kind == "llama":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
    else:
        moe = {"type": "moe", "num_experts": 4, "router": {"type": "top_k", "top_k": 2}}
        moe["experts"] = {"type": "swiglu", "intermediate_size": 16}
        blocks = {"moe": {"mixer": {"type": "attention"}, "feed_forward": moe}}
        model = AutoModelForCausalLM.from_config(
            tiny_config(kind, **({"blocks": blocks} if kind == "hf_moe" else {}), vocab_size=64)
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def home(kind: str, model: str = "qwen3_moe") -> str:
    """What an adapter is tried on: a mixture, but MixLoRA makes one of a dense model."""
    return "llama" if kind == "mix_lora" else model


def subset(model: Any) -> dict[str, list[int]]:
    """Two experts of every layer."""
    return {name: [0, 2] for name in expert_modules(model)}


def trained_sources(model: Any) -> list[str]:
    """Folders of two LoRA adapters for a model."""
    folders = []
    for seed in range(2):
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2 + seed, lora_alpha=16, target_modules=MIXER))
        disturb(wrapped, seed + 5)
        wrapped.save_pretrained(folder := tempfile.mkdtemp())
        folders.append(folder)
    return folders


KINDS: dict[str, Callable[[Any], PeftConfig]] = {
    "lora_all": lambda model: lora_config(model, verbose=False, init_lora_weights=True),
    "lora_subset": lambda model: lora_config(model, [0, 2], rank=3, lora_alpha=5, verbose=False),
    "lora_per_layer": lambda model: lora_config(
        model, {1: [1, 3]}, rank=2, rank_per_layer={1: 4}, router=True, attention=False, verbose=False
    ),
    "lora_rs": lambda model: lora_config(model, "all", rank=4, use_rslora=True, lora_dropout=0.1, verbose=False),
    "esft": lambda model: EsftConfig(experts=subset(model), task_type="CAUSAL_LM"),
    "smora": lambda model: SmoraConfig(r=8, top_k=2, target_modules=MIXER, router_aux_loss_coef=0.1),
    "smora_sigmoid": lambda model: SmoraConfig(r=8, top_k=3, target_modules=MIXER, scoring="sigmoid"),
    "hydra": lambda model: HydraLoraConfig(r=2, target_modules=MIXER),
    "mola": lambda model: MolaConfig(r=2, target_modules=MIXER, num_experts=[2, 3], num_layers=2),
    "mix_lora": lambda model: MixLoraConfig(
        r=2, target_modules=[*MIXER, *feed_forwards(model)], num_experts=3, lora_dropout=0.1
    ),
    "pst": lambda model: PstConfig(r=2, target_modules=[*MIXER, *subset(model)]),
    "scalearn": lambda model: ScalearnConfig(sources=trained_sources(model)),
    "ramt": lambda model: RamtConfig(target_modules=[*MIXER, *subset(model)]),
}
MIXER = ["q_proj", "o_proj"]
CANNOT_MERGE = {"smora", "smora_sigmoid", "hydra", "mola", "mix_lora"}


def adapted(kind: str, model: PreTrainedModel, seed: int | None = 1) -> PeftModel:
    """The model with an adapter; with a seed, one that has been trained, so to say."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, KINDS[kind](model))
    if seed is not None:
        disturb(wrapped, seed)
    return wrapped.eval()


def disturb(wrapped: PeftModel, seed: int = 1) -> None:
    """Add noise to whatever trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        expected = load_file(path)
        model = AutoModelForCausalLM.from_pretrained(path.parent / f"base_{home(path.stem)}")
        loaded = PeftModel.from_pretrained(model, path.parent / path.stem).eval()
        error = (logits(loaded, expected["tokens"]) - expected["logits"]).abs().max().item()
        print(path.stem, error)
        assert error < 1e-5, (path.stem, error)
