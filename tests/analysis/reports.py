"""An inspection with everything that a page may have to show, made up by hand."""

import random

from hf_moe.analysis import Inspection, LayerRouting, LayerRow, ModelFacts, RoutingFacts

DOMAINS = {"code <b>": 4000, "law & order": 3000}


def rows(num_layers: int, num_experts: int) -> list[LayerRow]:
    """One dense layer and then sparse ones, with the longest names that Transformers has."""
    mixer = "DeepseekV4Attention + 2 x DeepseekV4HyperConnection"
    sparse = (
        "Qwen3OmniMoeThinkerTextTopKRouter",
        "Qwen3OmniMoeThinkerTextExperts",
        "softmax",
        num_experts,
        0,
        4,
        768,
        0,
    )
    layer = "model.layers"
    return [
        LayerRow(layer, 0, 0, mixer, "q 4096, k 512", "Mlp", 9216, "", "", "", 0, 0, None, None, None, 10**7, 10**7),
        LayerRow(layer, 1, num_layers, mixer, "", "SparseBlock", None, *sparse, 10**9, 10**8),
    ]


def layer_routing(number: int, size: int, dead: list[int]) -> LayerRouting:
    """Uneven loads, drawn by number."""
    draw = random.Random(number)

    def loads() -> list[float]:
        counts = [0 if e in dead else draw.random() ** 3 for e in range(size)]
        return [count / sum(counts) for count in counts]

    pairs = [[0.0 if i == j else draw.random() for j in range(size)] for i in range(size)]
    return LayerRouting(
        name=f"model.layers.{number}.mlp",
        num_experts=size,
        num_zero_experts=0,
        choices=7000,
        experts_per_token=4.0,
        loads=loads(),
        max_vio=2.5,
        entropy=0.9,
        dead_experts=dead,
        confidence=0.4,
        router_entropy=0.7,
        coactivation=pairs,
        domain_loads={name: loads() for name in DOMAINS},
        specialization={name: [2 * draw.random() for _ in range(size)] for name in DOMAINS},
        divergence=draw.random() / 5,
    )


def inspection(num_layers: int = 3, num_experts: int = 8, routed: bool = True) -> Inspection:
    """A page's content; expert 3 of the second mixture is dead."""
    layers = rows(num_layers, num_experts)
    counts = (46_702_792_704, 12_879_925_248, 262_144_000, 262_148_096)
    facts = ModelFacts("qwen3_moe", "Qwen3MoeForCausalLM", "bfloat16", None, *counts, 98304.0, 4096, None, layers)
    routing = [layer_routing(n, num_experts, [3] if n == 2 else []) for n in range(1, num_layers + 1)]
    found = RoutingFacts(DOMAINS, routing, ["mtp.0.mlp"]) if routed else None
    return Inspection("organisation/a-model-with-a-rather-long-name-30B-A3B-<Instruct>", facts, 93 * 2**30, found)
