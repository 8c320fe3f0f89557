"""The recipes in docs/recipes: their full-size configs are valid, and at tiny size they train and generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_moe import HfMoeConfig, HfMoeForCausalLM

RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.yaml"))
PUBLISHED = {"kimi_linear": 48, "longcat_flash": 560, "minimax": 456}  # billions of parameters
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "num_heads": 2,
    "num_value_heads": 2,
    "key_head_dim": 8,
    "value_head_dim": 8,
    "state_size": 8,
    "num_groups": 2,
    "feature_dim": 4,
    "kv_lora_rank": 16,
    "num_zero_experts": 2,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "heads_per_expert": 2,
    "num_experts": 4,
    "top_k": 2,
    "intermediate_size": 16,
    "shared_intermediate_size": 16,
}


def shrink(node: Any) -> Any:
    """The same structure with tiny numbers wherever a size stands."""
    if not isinstance(node, dict):
        return node
    return {name: TINY[name] if name in TINY and node[name] else shrink(value) for name, value in node.items()}


def billions(config: HfMoeConfig) -> float:
    """How many billion parameters its model has."""
    with torch.device("meta"):
        return sum(p.numel() for p in HfMoeForCausalLM(config).parameters()) / 1e9


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param.stem, yaml.safe_load(request.param.read_text())


def test_full_size(recipe):
    name, fields = recipe
    config = HfMoeConfig(**fields)
    assert len(config.block_pattern) <= config.num_hidden_layers and set(config.block_pattern) == set(config.blocks)
    assert billions(config) == pytest.approx(PUBLISHED.get(name, billions(config)), rel=0.03)


def test_turbo_s_has_its_published_size_with_a_feed_forward_behind_every_attention():
    fields = yaml.safe_load((RECIPES[0].parent / "hunyuan_turbo_s.yaml").read_text())
    assert billions(HfMoeConfig(**fields)) == pytest.approx(504, rel=0.001)
    fields["blocks"]["a"] |= {"type": "pre_norm", "feed_forward": fields["blocks"]["mf"]["feed_forward"]}
    assert billions(HfMoeConfig(**fields)) == pytest.approx(560, rel=0.01)


def test_tiny_model_trains_and_generates(recipe):
    _, fields = recipe
    torch.manual_seed(0)
    model = HfMoeForCausalLM(HfMoeConfig(**shrink(fields)))
    ids = torch.randint(1, 99, (2, 8))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    generated = model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))


def test_the_table_names_every_recipe():
    text = (RECIPES[0].parent / "README.md").read_text()
    assert RECIPES and all(f"[{path.stem}]({path.name})" in text for path in RECIPES)
