"""Routing figures against naive counts: tokens one by one, routers by their papers' formulas, in float64."""

import math
from itertools import combinations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from hf_moe.analysis import expert_statistics
from hf_moe.analysis.figures import jensen_shannon_of_all, specialization
from hf_moe.testing import tiny_config

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "initializer_range": 0.5,
}
NATIVE = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True),
    "deepseek_v3": DeepseekV3Config(
        **COMMON,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
}
ZERO = {
    "type": "moe",
    "num_experts": 3,
    "num_zero_experts": 2,
    "router": {"type": "top_k", "top_k": 2},
    "experts": {"type": "swiglu", "intermediate_size": 8},
}
OURS = {
    "top_p": tiny_config("dynamic_moe", vocab_size=64, num_experts=5, num_hidden_layers=4),
    "zero": tiny_config("hf_moe", vocab_size=64, blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": ZERO}}),
}
KINDS = {**NATIVE, **OURS}


def model_of(kind: str):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float64, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "mlp.gate." in name:
            torch.nn.init.normal_(parameter)
    if kind == "deepseek_v3":
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(6))
    return model


def texts() -> dict[str, list[list[int]]]:
    torch.manual_seed(2)
    draw = lambda low, high, lengths: [torch.randint(low, high, (n,)).tolist() for n in lengths]  # noqa: E731
    return {"a": draw(1, 40, (3, 17, 8, 1)), "b": draw(30, 64, (12, 5))}


def choices_of(model, kind: str, document: list[int], layer: int) -> list[tuple[set[int], list[float]]]:
    """Per token: the chosen experts and the score of every expert, from what the router reads, by its formula."""
    seen = []
    gate = model.model.layers[layer].mlp.gate
    handle = gate.register_forward_pre_hook(lambda gate, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(torch.tensor([document]))
    handle.remove()
    weight, tokens = gate.weight.tolist(), seen[0].tolist()
    return [choose(kind, [sum(w * x for w, x in zip(row, token)) for row in weight], gate) for token in tokens]


def choose(kind: str, logits: list[float], gate) -> tuple[set[int], list[float]]:
    order = lambda values: sorted(range(len(values)), key=lambda e: -values[e])  # noqa: E731
    if kind == "deepseek_v3":  # sigmoid scores; the bias counts for the choice only
        scores = [1 / (1 + math.exp(-x)) for x in logits]
        biased = [s + b for s, b in zip(scores, gate.e_score_correction_bias.tolist())]
        return set(order(biased)[:2]), scores
    total = sum(math.exp(x) for x in logits)
    scores = [math.exp(x) / total for x in logits]
    if kind == "top_p":  # the fewest whose probabilities reach p
        chosen: list[int] = []
        while sum(scores[e] for e in chosen) < gate.p:
            chosen.append(order(scores)[len(chosen)])
        return set(chosen), scores
    return set(order(scores)[: 3 if kind == "qwen3_moe" else 2]), scores


def naive_entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p) / math.log(len(shares))


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_a_naive_count_without_padding(kind):
    model, domains = model_of(kind), texts()
    found = expert_statistics(model, domains, batch_size=3, max_length=10)
    number = 2 if kind == "top_p" else 1  # of dynamic_moe's layers every second one is sparse
    layer = next(layer for layer in found.layers if layer.name == f"model.layers.{number}.mlp")
    pieces = {name: [d[i : i + 10] for d in given for i in range(0, len(d), 10)] for name, given in domains.items()}
    tokens = {name: [t for d in given for t in choices_of(model, kind, d, number)] for name, given in pieces.items()}
    everything = [token for given in tokens.values() for token in given]
    size = len(everything[0][1])
    counts = [sum(e in chosen for chosen, _ in everything) for e in range(size)]
    assert found.tokens == {"a": 29, "b": 17} and layer.choices == len(everything) == 46
    assert layer.num_experts + layer.num_zero_experts == size == len(layer.loads)
    assert layer.loads == pytest.approx([c / sum(counts) for c in counts])
    assert layer.experts_per_token == pytest.approx(sum(counts) / 46)
    assert layer.max_vio == pytest.approx(max(counts) / (sum(counts) / size) - 1)
    assert layer.entropy == pytest.approx(naive_entropy([c / sum(counts) for c in counts]))
    assert layer.dead_experts == [e for e in range(size) if not counts[e]]
    distributions = [[s / sum(scores) for s in scores] for _, scores in everything]
    assert layer.confidence == pytest.approx(sum(map(max, distributions)) / 46, rel=1e-5)
    assert layer.router_entropy == pytest.approx(sum(map(naive_entropy, distributions)) / 46, rel=1e-5)
    for i in range(size):
        for j in range(size):
            both = sum(i in chosen and j in chosen for chosen, _ in everything)
            expected = both / counts[i] if i != j and counts[i] else 0
            assert layer.coactivation[i][j] == pytest.approx(expected)
    loads = []
    for name, given in tokens.items():
        own = [sum(e in chosen for chosen, _ in given) for e in range(size)]
        loads.append([c / sum(own) for c in own])
        assert layer.domain_loads[name] == pytest.approx(loads[-1])
    assert layer.divergence == pytest.approx(naive_divergence(*loads))


def naive_divergence(p: list[float], q: list[float]) -> float:
    kl = lambda x, y: sum(a * math.log2(a / b) for a, b in zip(x, y) if a)  # noqa: E731
    mean = [(a + b) / 2 for a, b in zip(p, q)]
    return (kl(p, mean) + kl(q, mean)) / 2


def test_experts_that_the_router_cannot_choose_are_dead():
    """Logits a, -a, 0.9 a, -0.9 a, 0: of five, two are chosen on either side, and the last one never."""
    model = model_of("mixtral")
    direction = torch.randn(16, dtype=torch.float64)
    scale = torch.tensor([1, -1, 0.9, -0.9, 0], dtype=torch.float64)
    model.model.layers[1].mlp.gate.weight.data.copy_(scale[:, None] * direction)
    layer = expert_statistics(model, {"all": [d for given in texts().values() for d in given]}).layers[1]
    assert layer.dead_experts == [4] and layer.loads[4] == 0 and layer.divergence is None
    expected = {(0, 2): 1.0, (2, 0): 1.0, (1, 3): 1.0, (3, 1): 1.0}
    for i, j in combinations(range(5), 2):
        assert layer.coactivation[i][j] == expected.get((i, j), 0.0)
        assert layer.coactivation[j][i] == expected.get((j, i), 0.0)


def test_a_selection_bias_kills_an_expert():
    model = model_of("deepseek_v3")
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([0, 0, -9.0, 0, 0, 0]))
    found = expert_statistics(model, texts())
    assert all(2 in layer.dead_experts for layer in found.layers)
    assert all(layer.specialization["a"][2] == 0 for layer in found.layers)


@pytest.mark.parametrize(
    ("distributions", "divergence"),
    [
        ([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]], 0.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 1.0),
        ([[1.0, 0.0], [0.5, 0.5]], naive_divergence([1.0, 0.0], [0.5, 0.5])),
    ],
)
def test_divergence_of_domains(distributions, divergence):
    assert jensen_shannon_of_all(torch.tensor(distributions).double()) == pytest.approx(divergence, abs=1e-12)


def test_specialization_is_relative_to_the_mean_of_the_domains():
    found = specialization(torch.tensor([[0.75, 0.25, 0], [0.25, 0.75, 0]]).double())
    assert found.tolist() == [[1.5, 0.5, 0], [0.5, 1.5, 0]]


def test_a_layer_with_several_routers_pools_them_and_one_that_text_does_not_pass_is_named():
    chain = AutoModelForCausalLM.from_config(tiny_config("coe")).eval()
    assert expert_statistics(chain, {"x": [[3, 4, 5]]}).layers[0].choices == 3 * 2
    ling = AutoModelForCausalLM.from_config(tiny_config("ling")).eval()
    found = expert_statistics(ling, {"x": [[3, 4, 5]]})
    assert [layer.name for layer in found.layers] == ["model.layers.1.mlp"]
    assert len(found.not_called) == 1 and found.not_called[0].startswith("mtp.")


def test_reads_no_more_than_it_is_told_and_reports_progress():
    model, seen = model_of("mixtral").train(), []
    found = expert_statistics(model, texts(), max_tokens=7, batch_size=1, progress=seen.append)
    assert found.tokens == {"a": 7, "b": 7} and seen == [3, 4, 7]
    assert model.training and model.model.layers[0].mlp.gate.training


def test_refusals():
    model = model_of("mixtral")
    with pytest.raises(ValueError, match="no tokens in 'b'"):
        expert_statistics(model, {"a": [[1]], "b": [[]]})
    with pytest.raises(ValueError, match="needs a domain"):
        expert_statistics(model, {})
    with pytest.raises(ValueError, match="no MoE layers"):
        expert_statistics(AutoModelForCausalLM.from_config(tiny_config("based")), {"a": [[1]]})
    dense = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in COMMON.items() if k != "moe_intermediate_size"}))
    with pytest.raises(ValueError, match="MoE layers of 'llama' are not known"):
        expert_statistics(dense, {"a": [[1]]})


def test_the_model_is_left_as_it_was():
    model = model_of("mixtral")
    expert_statistics(model, texts())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
