"""`top_k` with every option, against the formula, and against Transformers' routers of DeepSeek and LongCat."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE, LongcatFlashTopkRouter

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.routers import TopK

sys.path.insert(0, str(Path(__file__).parent))
import naive
from mixtures import agrees, feed_forward, inputs

SIZES = SimpleNamespace(
    hidden_size=16,
    num_experts_per_tok=4,
    num_local_experts=12,
    num_experts=12,
    n_routed_experts=8,
    zero_expert_num=4,
    expert_ffn_hidden_size=8,
    hidden_act="silu",
    routed_scaling_factor=2.5,
    n_group=3,
    topk_group=2,
    norm_topk_prob=True,
    topk_method="group_limited_greedy",
)
V3 = {"scoring": "sigmoid", "selection_bias": True, "scale": 2.5, "num_groups": 3, "groups_per_token": 2}
V2 = {"normalize": False, "scale": 2.5, "num_groups": 3, "groups_per_token": 2, "group_score": "max"}
LONGCAT = {"normalize": False, "selection_bias": True, "scale": 2.5}


def route(top_k, scoring="softmax", normalize=True, scale=1.0, groups=(1, 1, 2), biases=(False, False), zero=0):
    """groups: their number, how many a token may use, how many of their best scores rank them."""

    def choose(weights, tokens):
        chosen, scores = [], []
        for x in tokens:
            logits = weights["gate.weight"] @ x + (weights["gate.bias"] if biases[0] else 0)
            s = naive.sigmoid(logits) if scoring == "sigmoid" else naive.softmax(logits)
            ranking = (s + weights["gate.e_score_correction_bias"] if biases[1] else s).detach()
            number, kept, compared = groups
            size = len(ranking) // number
            if number > 1:
                blocks = ranking.view(number, size)
                sums = [sum(sorted(block.tolist(), reverse=True)[:compared]) for block in blocks]
                best = naive.best(torch.tensor(sums), kept)
                allowed = [e for e in range(len(ranking)) if e // size in best]
            else:
                allowed = list(range(len(ranking)))
            picked = [allowed[i] for i in naive.best(ranking[allowed], top_k)]
            share = sum(s[e] for e in picked) if normalize else 1
            chosen.append({e: scale * s[e] / share for e in picked})
            scores.append(s / s.sum())
        return chosen, scores, 0.0

    return choose


@pytest.mark.parametrize(
    "options, formula",
    [
        ({"scoring": "sigmoid"}, {"scoring": "sigmoid"}),
        ({"scoring": "sigmoid", "normalize": False, "bias": True}, {"scoring": "sigmoid", "normalize": False}),
        ({"selection_bias": True, "scale": 6.0, "normalize": False}, {"scale": 6.0, "normalize": False}),
        ({"scoring": "sigmoid", "num_groups": 3, "groups_per_token": 2}, {"scoring": "sigmoid", "groups": (3, 2, 2)}),
        ({"num_groups": 3, "group_score": "max"}, {"groups": (3, 1, 1)}),
        ({**V3, "bias": True}, {"scoring": "sigmoid", "scale": 2.5, "groups": (3, 2, 2)}),
    ],
)
def test_layer_is_the_formula(options, formula):
    layer = feed_forward({"type": "top_k", "top_k": 2, **options})
    biases = options.get("bias", False), options.get("selection_bias", False)
    if biases[0]:
        assert (layer.gate.bias == 0).all()
        torch.nn.init.normal_(layer.gate.bias)
    if biases[1]:
        assert (layer.gate.e_score_correction_bias == 0).all()
        layer.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    agrees(layer, route(2, **formula, biases=biases), inputs())


@pytest.mark.parametrize(
    "native, options",
    [(DeepseekV3TopkRouter, V3), (DeepseekV2TopkRouter, V2), (LongcatFlashTopkRouter, LONGCAT)],
    ids=["deepseek_v3", "deepseek_v2", "longcat_flash"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_is_the_native_one(native, options, dtype):
    torch.manual_seed(0)
    theirs, ours = native(SIZES), TopK(SIZES, 0, 12, top_k=4, **options)
    weight = theirs.classifier.weight if native is LongcatFlashTopkRouter else theirs.weight
    torch.nn.init.normal_(weight)
    ours.weight.data = weight.data.clone()
    theirs, ours, weight.data = theirs, ours.to(dtype), weight.data.to(dtype)
    if ours.e_score_correction_bias is not None:
        assert ours.e_score_correction_bias.dtype == torch.float32
        theirs.e_score_correction_bias.normal_(std=0.1)
        ours.e_score_correction_bias.copy_(theirs.e_score_correction_bias)
    results = []
    tokens, upstream = torch.randn(50, 16).to(dtype), torch.randn(50, 12)
    for router, own in ((theirs, weight), (ours, ours.weight)):
        x = tokens.clone().requires_grad_()
        logits, first, second = router(x)[:3]
        indices, weights = (second, first) if second.dtype == torch.int64 else (first, second)
        full = torch.zeros(50, 12).scatter(1, indices, weights.float())
        (full * upstream).sum().backward()
        results.append((logits, full, x.grad, own.grad))
    assert torch.equal(results[0][0], results[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # weights leave ours in the tokens' dtype
    for expected, actual in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_layer_with_identity_experts_is_longcats():
    torch.manual_seed(0)
    theirs = LongcatFlashMoE(SIZES)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs.router.e_score_correction_bias.normal_(std=0.1)
    router, experts = {"type": "top_k", "top_k": 4, **LONGCAT}, {"type": "swiglu", "intermediate_size": 8}
    spec = {"type": "moe", "num_experts": 8, "num_zero_experts": 4, "router": router, "experts": experts}
    config = HfMoeConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}},
    )
    ours = HfMoeForCausalLM(config).model.layers[0].mlp
    ours.gate.weight.copy_(theirs.router.classifier.weight)
    ours.gate.e_score_correction_bias.copy_(theirs.router.e_score_correction_bias)
    ours.experts.gate_up_proj.copy_(theirs.experts.gate_up_proj[:8])  # theirs has idle rows for identity experts
    ours.experts.down_proj.copy_(theirs.experts.down_proj)
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=2e-5, rtol=2e-5)


def test_autocast_leaves_the_scores_in_fp32():
    """A step of 0.001 of the selection bias would drown in bf16 scores."""
    router = TopK(SIZES, 0, 12, top_k=4, **V3)
    router.init_weights(1.0)
    x = torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == torch.float32 and torch.equal(routing.logits, router(x).logits)


@torch.no_grad()
def test_selection_bias_is_never_rounded(tmp_path):
    router = {"type": "top_k", "selection_bias": True}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": {"type": "swiglu", "intermediate_size": 8}}
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": spec}}
    config = HfMoeConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, blocks=blocks)
    model = HfMoeForCausalLM(config).bfloat16()
    bias = torch.tensor([1.001, 1.002, 1.003, -1.001])  # bf16 has steps of 1/128 there
    model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(tmp_path)
    for again in (HfMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.half()):
        assert again.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(again.model.layers[0].mlp.gate.e_score_correction_bias, bias)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 9}, r"top_k\) is 9; with num_experts=8 it must be 1 to 8"),
        ({"num_groups": 3}, r"num_groups=3 does not split 8 experts .* use one of \[1, 2, 4\]"),
        ({"num_groups": 8}, r"num_groups=8 does not split 8 experts .* use one of \[1, 2, 4\]"),
        ({"num_groups": 4, "groups_per_token": 5}, r"groups_per_token=5; with num_groups=4 it must be 1 to 4"),
        ({"groups_per_token": 2}, r"groups_per_token=2; with num_groups=1 it must be 1 to 1"),
        ({"num_groups": 4, "top_k": 3}, r"has 2 candidates; use top_k of 1 to 2, or more groups_per_token"),
        ({"group_loss_coef": 0.1}, r"group_loss_coef compares groups of experts: it needs num_groups of 2 or more"),
        ({"group_score": "mean"}, r"group_score='mean' is unknown; choose from \['max', 'top2_sum'\]"),
        ({"scoring": "tanh"}, r"scoring='tanh' is unknown; choose from \['softmax', 'softmax_selected', 'sigmoid'\]"),
    ],
)
def test_refusals(options, message):
    router, experts = {"type": "top_k", **options}, {"type": "swiglu", "intermediate_size": 8}
    spec = {"type": "moe", "num_experts": 8, "router": router, "experts": experts}
    with pytest.raises(ValueError, match=message):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})
