"""SPT's routed feed-forward against a float64 loop over tokens and blocks; and what it shares with a dense one."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import FEED_FORWARDS, HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HIDDEN, TOKENS = 8, 32, 6
ROUTED = {"type": "routed_ffn", "intermediate_size": HIDDEN}


def tiny(feed_forward: dict) -> HfMoeConfig:
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=4, num_attention_heads=2, blocks=blocks)


def build(implementation: str = "batched_mm", dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """The feed-forward alone, with weights large enough for every one of them to matter."""
    config = tiny({**ROUTED, **options})
    config._experts_implementation = implementation
    torch.manual_seed(0)
    parts = dict(config.block(0)["feed_forward"])
    feed_forward = FEED_FORWARDS[parts.pop("type")](config, 0, **parts)
    for parameter in feed_forward.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return feed_forward.to(dtype)


def hidden_states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def reference(x: Tensor, w: naive.Weights, blocks: int, chosen: int) -> Tensor:
    """As the released LoRA class for Llama without its LoRA: c = 2 sigmoid on gate, up and down products."""
    probabilities = naive.sigmoid(w["gate.weight"] @ x + w["gate.bias"])
    y, size = torch.zeros_like(x), HIDDEN // blocks
    for g in naive.best(probabilities, chosen):
        own = slice(g * size, (g + 1) * size)
        c = 2 * probabilities[g]
        gate, up = c * (w["gate_proj.weight"][own] @ x), c * (w["up_proj.weight"][own] @ x)
        y = y + c * (w["down_proj.weight"][:, own] @ (naive.silu(gate) * up))
    return y


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("blocks,chosen", [(4, None), (8, 3), (2, 2)])
def test_forward_and_gradients_follow_the_released_code(blocks, chosen, implementation):
    feed_forward = build(implementation, num_blocks=blocks, blocks_per_token=chosen)
    state, inputs = torch.ones(TOKENS, 2), hidden_states().requires_grad_()
    output, passed, losses = feed_forward(inputs, state)
    assert passed is state and losses is None
    w, xs = naive.double(feed_forward), inputs.detach().clone().requires_grad_()
    expected = torch.stack([reference(x, w, blocks, chosen or blocks // 2) for x in xs[0]])[None]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)  # the router's scores are fp32
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(inputs.grad, xs.grad, atol=2e-5, rtol=2e-5)
    for name, parameter in feed_forward.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=2e-5, rtol=2e-5)


def test_grouped_matrix_products_agree():
    inputs = hidden_states(torch.float32)
    expected = build("eager", torch.float32)(inputs)[0]
    torch.testing.assert_close(build("grouped_mm", torch.float32)(inputs)[0], expected)


def test_all_blocks_with_a_router_of_zeros_are_the_dense_feed_forward_they_were_cut_from():
    """A Llama checkpoint lacks nothing but the routers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=HIDDEN, initializer_range=0.3)).eval()
    block = {"mixer": {"type": "attention"}, "feed_forward": {**ROUTED, "blocks_per_token": 4}}
    routed = HfMoeForCausalLM(HfMoeConfig(**sizes, blocks={"b": block})).eval()
    keys = routed.load_state_dict(dense.state_dict(), strict=False)
    missing = {f"model.layers.{layer}.mlp.gate.{name}" for layer in range(2) for name in ("weight", "bias")}
    assert set(keys.missing_keys) == missing and not keys.unexpected_keys
    for layer in routed.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.bias.data.zero_()
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(routed(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


def test_scaled_once_it_would_be_a_mixture_of_experts():
    """What the docstring says of `moe`: blocks as experts, the router's weights at the end only."""
    feed_forward = build(blocks_per_token=2)
    router = {"type": "top_k", "top_k": 2, "normalize": False, "scoring": "sigmoid", "scale": 2.0, "bias": True}
    experts = {"type": "swiglu", "intermediate_size": HIDDEN // 4}
    config = tiny({"type": "moe", "num_experts": 4, "router": router, "experts": experts})
    config._experts_implementation = "batched_mm"
    parts = dict(config.block(0)["feed_forward"])
    moe = FEED_FORWARDS[parts.pop("type")](config, 0, **parts).double()
    gate, up, down = (getattr(feed_forward, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
    with torch.no_grad():
        moe.gate.load_state_dict(feed_forward.gate.state_dict())
        moe.experts.gate_up_proj.copy_(torch.cat([gate.unflatten(0, (4, -1)), up.unflatten(0, (4, -1))], 1))
        moe.experts.down_proj.copy_(down.unflatten(1, (4, -1)).transpose(0, 1))
    inputs = hidden_states()
    assert not torch.allclose(moe(inputs)[0], feed_forward(inputs)[0])
    for module in (moe, feed_forward):  # where every c is 1 they agree
        module.gate.weight.data.zero_()
        module.gate.bias.data.zero_()
    torch.testing.assert_close(moe(inputs)[0], feed_forward(inputs)[0])


@pytest.mark.parametrize("balance", [False, True])
def test_blocks_are_balanced_only_if_asked(balance):
    feed_forward = build(balance=balance).train()
    losses = feed_forward(hidden_states(), None, ForwardContext(losses=True))[2]
    assert losses.shape == (3,) and (losses[0] > 0) == balance and losses[1] > 0 and losses[2] == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_blocks": 5}, r"num_blocks=5 does not divide intermediate_size=32; use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"num_blocks": 0}, "num_blocks=0 does not divide"),
        ({"blocks_per_token": 5}, "blocks_per_token=5; with num_blocks=4 it must be 1 to 4"),
        ({"blocks_per_token": 0}, "blocks_per_token=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny({**ROUTED, **options})
