"""Total and active parameters of the published sizes, within 1% of the published figures.

"Rest" leaves out the embedding and the head, where a source counts so. Not determined by their papers, and not here:
* Kimi-Linear "48B-A3B" (its recipe has 49.1 B; the name rounds), DeepSeekMoE's active "2.8B" has two digits only
  (2.83 B), UltraMem's total "1.2B" too (1.23 B), Monet's "1.4B" and "4.1B" (1.465 B, which Table 8 gives, and 4.17 B).
* UltraMemV2's active "227M" (230 M here): what its authors leave out is not said.
* BlockFFN, Dynamic MoE's average, MoE-X, ReXMoE (2.3B-A0.3B), WideNet, THOR, SMoE-Dropout and PEER: the number of
  active experts varies, or layers, widths or vocabulary are not published.
"""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hf_moe import (
    BamConfig,
    CoeConfig,
    DeepseekMoeConfig,
    DynamicMoeConfig,
    HfMoeConfig,
    LingConfig,
    MogeConfig,
    MonetConfig,
    PeerConfig,
    UltraMemConfig,
    count_parameters,
)
from hf_moe.testing import tiny_config

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def recipe(name: str, **overrides) -> HfMoeConfig:
    return HfMoeConfig(**{**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), **overrides})


def without_input_embedding(config) -> int:
    """How LongCat counts what is active: the head is, the input embedding is not."""
    return count_parameters(config).active - config.vocab_size * config.hidden_size


def rest(config) -> int:
    counts = count_parameters(config)
    return counts.active - counts.embedding


def total_rest(config) -> int:
    counts = count_parameters(config)
    return counts.total - counts.embedding


def total(config) -> int:
    return count_parameters(config).total


def active(config) -> int:
    return count_parameters(config).active


def real_experts(number: int) -> HfMoeConfig:
    """LongCat-Flash as a token meets it that chooses so many true experts: without the others to choose from."""
    config = recipe("longcat_flash")
    config.blocks["shortcut"]["feed_forward"]["num_zero_experts"] = 0
    config.blocks["shortcut"]["feed_forward"]["router"]["top_k"] = number
    return config


BAM_SIZES = {
    "vocab_size": 256000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_experts": 4,
}
PUBLISHED = {  # what is counted, of which config, the figure, its source
    "ling_mini-rest": (rest, LingConfig.ling_mini, 789e6, "Ling-V2 README: 1.4B activated (non-embedding 789M)"),
    "ling_flash-total": (total, LingConfig.ling_flash, 103e9, "arXiv 2510.22115"),
    "ling_flash-active": (active, LingConfig.ling_flash, 6.1e9, "arXiv 2510.22115"),
    "ling_1t-total": (total, LingConfig.ling_1t, 1e12, "arXiv 2510.22115"),
    "ling_1t-active": (active, LingConfig.ling_1t, 51e9, "arXiv 2510.22115"),
    "deepseek_moe-total": (total, DeepseekMoeConfig, 16.4e9, "arXiv 2401.06066"),
    "longcat-total": (total, lambda: recipe("longcat_flash"), 560e9, "arXiv 2509.01322, abstract"),
    "longcat-average": (without_input_embedding, lambda: recipe("longcat_flash"), 27e9, "arXiv 2509.01322, abstract"),
    "longcat-most": (without_input_embedding, lambda: real_experts(12), 31.3e9, "arXiv 2509.01322, abstract"),
    "minimax-total": (total, lambda: recipe("minimax"), 456e9, "arXiv 2501.08313, abstract"),
    "minimax-active": (rest, lambda: recipe("minimax"), 45.9e9, "arXiv 2501.08313, abstract"),
    "moge-total": (total, MogeConfig, 71.99e9, "arXiv 2505.21411: Pangu Pro MoE 72B-A16B"),
    "moge-active": (active, MogeConfig, 16.50e9, "arXiv 2505.21411"),
    "monet_850m-total": (total, MonetConfig.monet_850m, 850e6, "arXiv 2412.04139, Table 6"),
    "monet-total": (total, MonetConfig.monet_1b4, 1.465e9, "arXiv 2412.04139, Table 8"),
    "dynamic_moe-total": (total, DynamicMoeConfig.paper_3b, 3.5e9, "arXiv 2403.07652, as recalled"),
    "coe-rest": (total_rest, CoeConfig.paper_coe_2, 544.3 * 2**20, "README of ZihanWang314/CoE: 544MB"),
    "ultramem_1-active": (active, UltraMemConfig.version_1_227m, 227e6, "arXiv 2508.18756"),
    "bam-total": (total, lambda: BamConfig(**BAM_SIZES), 776e6, "arXiv 2408.08274, Table 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_size(case):
    count, config, published, source = PUBLISHED[case]
    assert count(config()) == pytest.approx(published, rel=0.01), source


def test_figures_of_two_digits():
    """They round to what was published, but 1% is finer than their last digit."""
    assert round(active(DeepseekMoeConfig()) / 1e9, 1) == 2.8
    assert round(active(LingConfig.ling_mini()) / 1e9, 1) == 1.4 and round(total(LingConfig.ling_mini()) / 1e9) == 16
    assert round(total(UltraMemConfig.paper_227m()) / 1e9, 1) == 1.2


def by_name(config, stacked: str, share: float) -> int:
    """A second way to count: everything, less what is not used of the tensors with a part of that name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unused = sum(p.numel() for name, p in model.named_parameters() if stacked in name) * (1 - share)
    return round(sum(p.numel() for p in model.parameters()) - unused)


EXPERTS = {"type": "swiglu", "intermediate_size": 16}
MOE = {"type": "moe", "num_experts": 4, "router": {"type": "top_k", "top_k": 3}, "experts": EXPERTS}


def composed(mixer: dict, feed_forward: dict) -> HfMoeConfig:
    block = {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}
    return tiny_config("hf_moe", blocks={"b": block})


ATTENTION = {"type": "attention"}
MLP = {"type": "mlp", "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "stacked", "share"),
    [
        (lambda: tiny_config("ling", num_nextn_predict_layers=2), ".experts.", 2 / 4),
        (lambda: composed(ATTENTION, {**MOE, "num_zero_experts": 2}), ".experts.", 3 / 6),
        (lambda: composed(ATTENTION, {**MOE, "router": {"type": "top_p"}}), ".experts.", 1),
        (lambda: composed(ATTENTION, {**MOE, "type": "chain_of_experts"}), ".experts.", 1),
        (lambda: composed(ATTENTION, {**MOE, "type": "pooled_moe", "layers_per_pool": 2}), "experts.", 3 / 4),
        (lambda: composed(ATTENTION, {"type": "routed_ffn", "intermediate_size": 32}), "_proj.", None),
        (lambda: composed({"type": "switch_head", "num_heads": 2, "num_experts": 4}, MLP), "self_attn", None),
        (lambda: composed({"type": "mixture_of_attention", "num_experts": 4}, MLP), "self_attn", None),
        (PeerConfig, ".w_", None),
    ],
    ids=["ling", "zero", "top_p", "chain", "pool", "routed_ffn", "switch_head", "moa", "peer"],
)
def test_active_parameters(config, stacked, share):
    config = config()
    counts = count_parameters(config)
    assert counts.embedding == (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    if share is None:
        assert counts.embedding < counts.active < counts.total
    else:
        assert counts.active == by_name(config, stacked, share)


def test_nothing_is_allocated(monkeypatch):
    """A model of a trillion parameters is counted on a machine that could not hold it."""
    made = []
    linear = nn.Linear.__init__
    monkeypatch.setattr(nn.Linear, "__init__", lambda self, *a, **k: (linear(self, *a, **k), made.append(self))[0])
    count_parameters(tiny_config("ling"))
    assert made and all(module.weight.is_meta for module in made)
