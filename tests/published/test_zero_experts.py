"""Experts that compute nothing: LongCat-Flash's identity experts, AdaMoE's null experts.

They must cost no matrix product: the tests count the rows that reach the experts.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hf_moe

sys.path.insert(0, str(Path(__file__).parent))
from mixtures import agrees, close, feed_forward, inputs
from test_top_k_families import route


def grouped_flops(rows, matrices, *args, **kwargs):
    """Of S rows (S, K), each times one of the matrices (E, K, M): torch has no count of it."""
    return 2 * rows[0] * rows[1] * matrices[2]


def expert_rows(layer, x):
    """How many tokens' worth of an expert's three matrices a forward pass multiplies, and how many are in use."""
    tokens = x.flatten(0, 1)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
        layer(x)
    with FlopCounterMode(display=False) as of_gate:
        routing = layer.gate(tokens)
    per_row = 2 * sum(parameter[0].numel() for parameter in layer.experts.parameters())
    used = (routing.weights != 0) & (routing.indices < layer.num_experts)
    return (counter.get_total_flops() - of_gate.get_total_flops()) / per_row, used


@pytest.mark.parametrize("zero", ["identity", "null"])
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_is_the_formula(zero, normalize):
    layer = feed_forward(
        {"type": "top_k", "top_k": 3, "normalize": normalize}, num_zero_experts=3, zero_expert_type=zero
    )
    agrees(layer, route(3, normalize=normalize), inputs(), zero=zero)


def test_adamoe_renormalises_over_the_true_experts():
    layer = feed_forward(
        {"type": "top_k", "top_k": 4}, num_zero_experts=4, zero_expert_type="null", renormalize_true_experts=True
    )

    def choose(weights, tokens):
        chosen, scores, own = route(4)(weights, tokens)
        rows = []
        for row in chosen:
            true = sum((weight for e, weight in row.items() if e < 6), torch.zeros((), dtype=torch.float64))
            rows.append({e: weight / true if e < 6 else weight for e, weight in row.items()})
        return rows, scores, own

    agrees(layer, choose, inputs())


@pytest.mark.parametrize("zero", ["identity", "null"])
@pytest.mark.parametrize(
    "router",
    [
        {"type": "top_k", "top_k": 4, "scoring": "sigmoid", "selection_bias": True},
        {"type": "top_p", "p": 0.5},
        {"type": "sparse_mixer", "top_k": 5, "top_p": 0.6, "sample": False},
        {"type": "relu_norm"},
    ],
    ids=lambda router: router["type"],
)
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_only_true_slots_reach_the_experts(router, zero, implementation):
    layer = feed_forward(router, num_zero_experts=4, zero_expert_type=zero).float()
    layer.experts.config._experts_implementation = implementation
    rows, used = expert_rows(layer, inputs().float())
    assert 0 < used.sum() < used.numel()
    assert rows == used.sum()


@pytest.mark.parametrize("zero", ["identity", "null"])
def test_a_batch_of_zero_experts_only(zero):
    """Nothing to compute, and every parameter still has a gradient."""
    layer = feed_forward(
        {"type": "top_k", "top_k": 2, "selection_bias": True}, num_zero_experts=3, zero_expert_type=zero
    )
    layer.gate.e_score_correction_bias[6:] = 9
    x = inputs()
    output = layer(x)[0]
    close(output, x if zero == "identity" else torch.zeros_like(x), 1e-6)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())
    assert all((parameter.grad == 0).all() for parameter in layer.experts.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_zero_experts": -1}, "num_zero_experts at least 0"),
        ({"zero_expert_type": "copy"}, r"zero_expert_type='copy' is unknown; choose from \['identity', 'null'\]"),
    ],
)
def test_refusals(options, message):
    router, experts = {"type": "top_k", "top_k": 2}, {"type": "swiglu", "intermediate_size": 8}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": experts, **options}
    with pytest.raises(ValueError, match=message):
        hf_moe.HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})


def test_renormalising_without_zero_experts_is_refused():
    with pytest.raises(ValueError, match="no effect without num_zero_experts"):
        feed_forward({"type": "top_k", "top_k": 2}, renormalize_true_experts=True)
