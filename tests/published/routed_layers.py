"""Sparse feed-forwards by themselves, in float64, against references that loop over tokens and experts."""

from collections.abc import Callable
from typing import Any

import naive
import torch
from torch import Tensor

from hf_moe import FEED_FORWARDS, HfMoeConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.parts import build, resolve

WIDTH, EXPERTS = 6, 4


def tokens(number: int, seed: int = 0) -> Tensor:
    """(number, WIDTH) random tokens."""
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(router: dict[str, Any], depth: int = 1, experts: dict[str, Any] | None = None, std: float = 0.7) -> Any:
    """`depth` sparse feed-forwards behind each other, by default with ReLU experts, in training mode."""
    experts = {"type": "mlp", "intermediate_size": 5, **(experts or {})}
    moe = {"type": "moe", "num_experts": EXPERTS, "router": router, "experts": experts}
    block = {"mixer": {"type": "attention"}, "feed_forward": moe}
    config = HfMoeConfig(hidden_size=WIDTH, num_attention_heads=1, num_hidden_layers=depth, blocks={"b": block})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    spec = resolve(FEED_FORWARDS, moe)
    modules = torch.nn.ModuleList(build(FEED_FORWARDS, spec, config, layer_idx) for layer_idx in range(depth))
    for module in modules.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(std)
    return modules.double()


def run(modules: Any, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
    """Output (N, D) and summed losses (3,) of residual layers."""
    state, losses = None, torch.zeros(3, dtype=torch.float64)
    for module in modules:
        output, state, wanted = module(x, state, context)
        x, losses = x + output, losses + wanted.double()
    return x, losses


def relu_expert(w: naive.Weights, prefix: str, expert: int, x: Tensor) -> Tensor:
    """`W_down relu(W_up x)`."""
    hidden = w[f"{prefix}.ungated_experts.up_proj"][expert] @ x
    return w[f"{prefix}.ungated_experts.down_proj"][expert] @ (hidden * (hidden > 0))


def compare(modules: Any, x: Tensor, context: ForwardContext, reference: Callable, tolerance: float = 1e-5) -> None:
    """Outputs, losses and the gradients of the tokens and of every parameter.

    `reference(weights, tokens (N, D)) -> (outputs (N, D), losses (3,))` for float64 leaves.
    """
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = naive.double(modules)
    output, losses = run(modules, ours, context)
    expected, expected_losses = reference(weights, theirs)
    close = {"atol": tolerance, "rtol": tolerance}  # scores are fp32 by design
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(losses, expected_losses, **close)
    direction, third = tokens(len(x), seed=9), torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    ((output * direction).sum() + (losses * third).sum()).backward()
    ((expected * direction).sum() + (expected_losses * third).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    for name, parameter in modules.named_parameters():
        wanted = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weights[name])
        torch.testing.assert_close(parameter.grad, wanted, **close, msg=lambda m, n=name: f"{n}: {m}")
