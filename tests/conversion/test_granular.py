"""`granular`: shards of copies or of several models, some of them shared."""

import copy

import pytest
import torch
from dense_models import dense_model, dense_models, logits
from transformers import AutoModelForCausalLM

from hf_moe.conversion import Options, plan_upcycling, save_upcycled
from hf_moe.conversion.upcycling import execute

WIDTH = 64  # the grouped product wants shards of a multiple of 16 bytes


def granular(sources, **options):
    plan = plan_upcycling(sources, Options(**{"target": "hf_moe", "method": "granular", "router_std": 0.5, **options}))
    return plan, execute(plan)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_copies_are_exact(shared, top_k, tmp_path):
    """One copy, or two of them, chosen per token; whatever is shared."""
    model, routed = dense_model("llama", intermediate_size=WIDTH), 4 - shared
    plan, mixture = granular(model, num_experts=3 * routed, shared_experts=shared, top_k=top_k * routed)
    assert plan.guarantee.exactness == "exact"
    mixture = AutoModelForCausalLM.from_pretrained(save_upcycled(mixture, tmp_path / "out"))
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


def test_equal_models_are_exact_but_different_ones_promise_nothing():
    model = dense_model("llama", intermediate_size=WIDTH)
    plan, mixture = granular([model, copy.deepcopy(model)], shared_experts=1)
    assert plan.layout.num_experts == 6 and plan.guarantee.exactness == "needs training"
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


def test_experts_of_several_models():
    """Expert n R + r is shard K + r of model n, times R."""
    models = dense_models("llama", 2, intermediate_size=WIDTH)
    _, mixture = granular(models, shared_experts=1)
    for number in range(6):
        source, shard = divmod(number, 3)
        rows = slice(16 * (shard + 1), 16 * (shard + 2))
        dense = models[source].model.layers[1].mlp
        experts = mixture.model.layers[1].mlp.experts
        assert torch.equal(experts.gate_up_proj[number, 16:], dense.up_proj.weight[rows])
        torch.testing.assert_close(experts.down_proj[number], 3 * dense.down_proj.weight[:, rows])
    mean = sum(model.model.layers[1].mlp.up_proj.weight[:16] for model in models) / 2
    torch.testing.assert_close(mixture.model.layers[1].mlp.shared_expert.up_proj.weight, mean)


def test_a_router_row_per_shard_is_not_exact():
    model = dense_model("llama", intermediate_size=WIDTH)
    plan, mixture = granular(model, router_init="random")
    assert plan.guarantee.exactness == "needs training"
    assert (logits(mixture) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 3}, r"granularity=3 does not divide intermediate_size=40; choose from \[1, 2, 4, 5"),
        ({"shared_experts": 4}, "shared_experts=4 must be below granularity=4"),
        ({"num_experts": 10}, r"num_experts=10 is not a multiple of 4, the routed shards of a copy; choose from \[4"),
        ({"top_k": 3}, r"top_k=3 is not a multiple of 4.*choose from \[4, 8"),
        ({"router_init": "zero"}, "router_init='zero': with equal scores top-k does not choose one of each shard"),
        ({"router_std": 0.0}, "router_std=0: with equal scores"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        granular(dense_model("llama"), **options)
