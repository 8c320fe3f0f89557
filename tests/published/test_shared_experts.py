"""Shared experts of `moe`: one or several, gated or not, against a float64 loop and Transformers' own blocks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from hf_moe import FEED_FORWARDS, HfMoeConfig
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, ROUTED, SHARED, EXPERTS, TOKENS = 8, 4, 3, 4, 6


def spec(**options) -> dict:
    experts = {"type": "swiglu", "intermediate_size": ROUTED}
    router = {"type": "top_k", "top_k": 2, "normalize": False}
    return {"type": "moe", "num_experts": EXPERTS, "router": router, "experts": experts, **options}


def tiny(feed_forward: dict) -> HfMoeConfig:
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=4, num_attention_heads=2, blocks=blocks)


def build(dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """The feed-forward alone, with weights large enough for every one of them to matter."""
    config = tiny(spec(shared_intermediate_size=SHARED, **options))
    config._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    parts = dict(config.block(0)["feed_forward"])
    feed_forward = FEED_FORWARDS[parts.pop("type")](config, 0, **parts)
    for parameter in feed_forward.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return feed_forward.to(dtype)


def hidden_states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def reference(x: Tensor, w: naive.Weights, num_shared: int, gated: bool) -> Tensor:
    """sum of the chosen p_e E_e(x) plus the sum over shared experts of E_s(x), each times sigmoid(w_s x) if gated."""
    scores = naive.softmax(w["gate.weight"] @ x)
    y = torch.zeros_like(x)
    for e in naive.best(scores, 2):
        gate_up, down = w["experts.gate_up_proj"][e], w["experts.down_proj"][e]
        y = y + scores[e] * naive.swiglu(x, gate_up[:ROUTED], gate_up[ROUTED:], down)
    for s in range(num_shared):
        own = slice(s * SHARED, (s + 1) * SHARED)
        gate, up = (w[f"shared_expert.{name}_proj.weight"][own] for name in ("gate", "up"))
        output = naive.swiglu(x, gate, up, w["shared_expert.down_proj.weight"][:, own])
        y = y + (naive.sigmoid(w["shared_expert_gate.weight"][s] @ x) * output if gated else output)
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_shared", [1, 3])
def test_forward_and_gradients_follow_the_formula(num_shared, gated):
    feed_forward = build(num_shared_experts=num_shared, shared_gate=gated)
    inputs = hidden_states().requires_grad_()
    output, state, losses = feed_forward(inputs)
    assert state is None and losses is None
    w, xs = naive.double(feed_forward), inputs.detach().clone().requires_grad_()
    expected = torch.stack([reference(x, w, num_shared, gated) for x in xs[0]])[None]
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)  # the router's scores are fp32
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(inputs.grad, xs.grad, atol=1e-5, rtol=1e-5)
    for name, parameter in feed_forward.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=1e-5, rtol=1e-5)


def test_one_gated_shared_expert_is_that_of_qwen2_moe():
    sizes = {"hidden_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": ROUTED}
    stock_config = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=SHARED)
    stock_config._experts_implementation = "eager"
    stock, ours = Qwen2MoeSparseMoeBlock(stock_config), build(torch.float32, shared_gate=True)
    stock.load_state_dict(ours.state_dict())
    inputs = [hidden_states(torch.float32).requires_grad_() for _ in range(2)]
    outputs = [stock(inputs[0]), ours(inputs[1])[0]]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    gradients = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_several_shared_experts_are_one_wide_feed_forward_of_deepseek():
    config = DeepseekV3Config(hidden_size=WIDTH, moe_intermediate_size=SHARED, n_shared_experts=3)
    stock = DeepseekV3MLP(config, intermediate_size=SHARED * config.n_shared_experts)
    ours = build(torch.float32, num_shared_experts=3)
    stock.load_state_dict(ours.shared_expert.state_dict())
    inputs = hidden_states(torch.float32)
    torch.testing.assert_close(ours.run_shared_experts(inputs), stock(inputs))


@pytest.mark.parametrize("num_shared", [1, 2])
def test_a_gate_of_zeros_halves_the_shared_experts(num_shared):
    gated = build(num_shared_experts=num_shared, shared_gate=True)
    plain = build(num_shared_experts=num_shared)
    gated.shared_expert_gate.weight.data.zero_()
    plain.shared_expert.load_state_dict(gated.shared_expert.state_dict())
    inputs = hidden_states()
    torch.testing.assert_close(gated.run_shared_experts(inputs), plain.run_shared_experts(inputs) / 2)


def test_only_gates_inside_the_sum_keep_the_shared_experts_whole():
    """One gate multiplies the sum of the shards; several would have to be cut with the neurons they scale."""
    plans = {
        (number, gated): tiny(
            spec(shared_intermediate_size=SHARED, num_shared_experts=number, shared_gate=gated)
        ).base_model_tp_plan
        for number in (1, 2)
        for gated in (False, True)
    }
    sharded = {case for case, plan in plans.items() if any("shared_expert" in name for name in plan)}
    assert sharded == {(1, False), (1, True), (2, False)}


@pytest.mark.parametrize(
    "options,message",
    [
        ({"shared_gate": True}, "shared_gate=True needs a shared expert: set shared_intermediate_size"),
        ({"shared_intermediate_size": 4, "num_shared_experts": 0}, "num_shared_experts must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(spec(**options))
