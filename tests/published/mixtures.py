"""One sparse feed-forward against a naive mixture: outputs, losses, and the gradients of inputs and all parameters."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.context import ForwardContext

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, ROWS, TIME = 12, 2, 7
Route = Callable[[naive.Weights, list[Tensor]], tuple[list[dict[int, Tensor]], list[Tensor], Tensor]]


def feed_forward(router: dict[str, Any], num_experts: int = 6, **options: Any) -> torch.nn.Module:
    """The sparse half of a block in float64, whose softmaxes still run in fp32."""
    torch.manual_seed(0)
    experts = {"type": "swiglu", "intermediate_size": 8}  # kernels want rows of 16 bytes
    spec = {"type": "moe", "num_experts": num_experts, "router": router, "experts": experts, **options}
    config = HfMoeConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
        blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}},
    )
    model = HfMoeForCausalLM(config).double()
    model.set_experts_implementation("eager")
    return model.model.layers[0].mlp


def inputs(seed: int = 1) -> Tensor:
    """(B, T, D)."""
    return torch.randn(ROWS, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def expert(weights: naive.Weights, number: int, x: Tensor) -> Tensor:
    """E_e(x) of SwiGLU experts."""
    gate, up = weights["experts.gate_up_proj"][number].chunk(2)
    return naive.swiglu(x, gate, up, weights["experts.down_proj"][number])


def agrees(layer: torch.nn.Module, route: Route, x: Tensor, mask: Tensor | None = None, zero: str = "null") -> None:
    """Compare `layer` with `y = sum_e w_e E_e(x)` over what `route` gives each token.

    Args:
        route: (weights, tokens) -> per token {expert: weight}, the scores that are balanced, the router's own loss.
        mask: (B, T) False for padding, which no loss may see.
        zero: what experts beyond those with parameters return: `identity` or `null`.
    """
    context = ForwardContext(losses=True, shape=(ROWS, TIME), token_mask=None if mask is None else mask.flatten())
    weights = naive.double(layer)
    x, own_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, _, losses = layer(x, None, context)
    tokens = list(own_x.flatten(0, 1))
    chosen, scores, own = route(weights, tokens)
    rows = []
    for token, picked in zip(tokens, chosen):
        row = torch.zeros(WIDTH, dtype=torch.float64)
        for number, weight in picked.items():
            if number < layer.num_experts:
                row = row + weight * expert(weights, number, token)
            elif zero == "identity":
                row = row + weight * token
        rows.append(row)
    expected = torch.stack(rows).view_as(own_x)
    close(output, expected)
    real = range(len(tokens)) if mask is None else mask.flatten().nonzero().flatten().tolist()
    balance = naive.switch([scores[n] for n in real], [list(chosen[n]) for n in real]) if scores else torch.zeros(())
    close(losses[0], balance.double())
    close(losses[2], torch.as_tensor(own, dtype=torch.float64))
    upstream = inputs(2)
    ((output * upstream).sum() + losses[0] + losses[2]).backward()
    ((expected * upstream).sum() + balance + own).backward()
    close(x.grad, own_x.grad)
    for name, parameter in layer.named_parameters():
        wanted = weights[name].grad
        close(parameter.grad, torch.zeros_like(weights[name]) if wanted is None else wanted)
