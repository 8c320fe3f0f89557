"""Every router learns which expert a token needs: four domains of tokens, each with a linear map of its own.

Two layers of experts, nothing between them, regress on the domain's map. A dense stack of the size that is active per
token cannot hold four maps; routing by domain can. What a router does at the start and at the end is measured by the
mutual information of domain and expert.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hf_moe
from hf_moe import HfMoeConfig, HfMoeModel
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.controllers import max_violation
from hf_moe.training import empty_loads, update_biases

NUM_DOMAINS, WIDTH, EXPERT_SIZE = 4, 32, 16
BATCH, LENGTH, STEPS, LEARNING_RATE = 256, 8, 300, 1e-2  # tokens, those of a sequence, which is of one domain
BALANCE = 0.01  # weight of the balance loss


@dataclass
class Row:
    """How a router is trained here.

    Args:
        router: its options.
        num_experts: routed experts of each layer.
        experts: which kind; the dense stack has a gate if they have.
        rises: whether what it chooses by is learned, so that the mutual information must rise.
        wins: whether it must beat the dense stack.
    """

    router: dict[str, Any] = field(default_factory=dict)
    num_experts: int = 8
    experts: str = "swiglu"
    rises: bool = True
    wins: bool = True


ROWS = {
    "top_k": Row(),
    "soft": Row(experts="mlp"),
    "recurrent": Row({"state_size": 16}),
    "sparsity_aware": Row(experts="mlp"),
    # a uniform draw for all tokens at once: no expert can learn a domain
    "random": Row({"inference": "all"}, rises=False, wins=False),
    "frozen": Row(rises=False),  # its map is never trained
    "decoupled": Row({"top_k": 2}),
    "prototype": Row({"top_k": 2}),
    "uncertainty": Row(),
    "pre_gated": Row({"top_k": 2}),
    "modality": Row(),
    "condition": Row({"condition_size": 6, "sample": False}),  # samples keep experts alike for longer than this
    "grouped_top_k": Row({"top_k": 2, "num_groups": 2}),
    "top_p": Row(),
    "relu_norm": Row({"chunk_size": LENGTH}, experts="mlp"),
    "sparse_mixer": Row(),
    "noisy_top_k": Row({"top_k": 2, "network": "mlp"}),
}


class Task:
    """`y = A_d x` with `x = c_d + noise`: the domain shows in the token, what it asks for does not."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(NUM_DOMAINS, WIDTH, generator=self.generator)
        self.maps = torch.randn(NUM_DOMAINS, WIDTH, WIDTH, generator=self.generator) / WIDTH**0.5
        self.conditions = torch.randn(NUM_DOMAINS, 6, generator=self.generator)

    def draw(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ForwardContext]:
        """Tokens (N, D), targets (N, D), domains (N,), and a context that knows type and condition of each token."""
        domains = torch.randint(NUM_DOMAINS, (number // LENGTH,), generator=self.generator).repeat_interleave(LENGTH)
        tokens = self.centres[domains] + torch.randn(number, WIDTH, generator=self.generator)
        targets = torch.einsum("nde,ne->nd", self.maps[domains], tokens)
        condition = self.conditions[domains] + 0.3 * torch.randn(number, 6, generator=self.generator)
        shape = (number // LENGTH, LENGTH)
        inputs = {"token_type_ids": domains.view(shape) // 2, "router_condition": condition.view(*shape, 6)}
        return tokens, targets, domains, ForwardContext(losses=True, shape=shape, inputs=inputs)


class Stack(torch.nn.Module):
    """The feed-forwards of a model, each with its norm and residual."""

    def __init__(self, feed_forward: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = HfMoeConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.15,
            blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}},
        )
        self.model = HfMoeModel(config)

    def forward(self, tokens: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor, list]:
        """(N, D) prediction, the losses (3,), and every layer's routing."""
        routings, total = [], tokens.new_zeros(3)
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda module, args, routing: routings.append(routing))
            for layer in self.model.layers
            if hasattr(layer.mlp, "gate")
        ]
        context = ForwardContext(**{**vars(context), "shared": self.model.shared})
        hidden, state = tokens[None], None
        for layer in self.model.layers:
            output, state, losses = layer.mlp(layer.post_attention_layernorm(hidden), state, context)
            hidden = hidden + output
            if losses is not None:
                total = total + losses
        for hook in hooks:
            hook.remove()
        return hidden[0], total, routings


def error(stack: Stack) -> tuple[float, list, torch.Tensor]:
    """The mean squared error on new tokens in units of predicting 0, with their routings and domains."""
    task = Task()
    task.generator.manual_seed(1)
    tokens, targets, domains, context = task.draw(2048)
    with torch.no_grad():
        prediction, _, routings = stack.eval()(tokens, context)
    return (F.mse_loss(prediction, targets) / targets.square().mean()).item(), routings, domains


def train(stack: Stack, bias_rate: float = 0.0, balance: float = BALANCE) -> float:
    """The error after training; seeds are fixed."""
    task = Task()
    stack.train()
    optimizer = torch.optim.AdamW(stack.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _ in range(STEPS):
        tokens, targets, _, context = task.draw(BATCH)
        prediction, losses, _ = stack(tokens, context)
        optimizer.zero_grad()
        (F.mse_loss(prediction, targets) + (losses * losses.new_tensor([balance, 0.0, 1.0])).sum()).backward()
        optimizer.step()
        schedule.step()
        update_biases(stack, bias_rate)
        empty_loads(stack)
    return error(stack)[0]


def shares(routing, num_experts: int) -> torch.Tensor:
    """(N, E) how each token is divided among the experts; rows sum to 1 where any is used."""
    given = torch.zeros(len(routing.indices), num_experts).scatter_add_(1, routing.indices, routing.weights.abs())
    return given / given.sum(-1, keepdim=True).clamp(min=1e-9)


def mutual_information(routings: list, domains: torch.Tensor, num_experts: int) -> float:
    """I(domain; expert) in nats, averaged over the layers; at most log 4."""
    values = []
    for routing in routings:
        joint = F.one_hot(domains, NUM_DOMAINS).float().T @ shares(routing, num_experts)  # (domains, E)
        joint = joint / joint.sum()
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        values.append(torch.where(joint > 0, joint * (joint / independent.clamp(min=1e-20)).log(), 0).sum().item())
    return sum(values) / len(values)


def experts_per_token(routings: list) -> float:
    return sum((routing.weights != 0).sum(-1).float().mean().item() for routing in routings) / len(routings)


def dead_experts(routings: list, num_experts: int) -> float:
    """The share of experts that get less than a hundredth of an even share."""
    loads = [shares(routing, num_experts).mean(0) for routing in routings]
    return sum((load < 0.01 / num_experts).float().mean().item() for load in loads) / len(loads)


@cache
def dense_error(experts: str, size: int) -> float:
    """The error of a dense stack of this width."""
    kind = {"type": "mlp"} if experts == "swiglu" else {"type": "ungated_mlp", "activation": "relu"}
    return train(Stack({**kind, "intermediate_size": size}))


def test_every_router_has_a_row():
    assert ROWS.keys() == hf_moe.ROUTERS.keys()


# one of each way to choose and to weigh in the default run, the others with `make test-slow`
DEFAULT = {"top_k", "soft", "recurrent", "relu_norm", "top_p", "noisy_top_k", "grouped_top_k"}
KINDS = [kind if kind in DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in hf_moe.ROUTERS]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, record_property):
    row = ROWS[kind]
    experts = {"type": row.experts, "intermediate_size": EXPERT_SIZE}
    router = {"type": kind, **row.router}
    stack = Stack({"type": "moe", "num_experts": row.num_experts, "router": router, "experts": experts})
    _, routings, domains = error(stack)
    before = mutual_information(routings, domains, row.num_experts)
    routed = train(stack)
    _, routings, domains = error(stack)
    after = mutual_information(routings, domains, row.num_experts)
    active, dead = experts_per_token(routings), dead_experts(routings, row.num_experts)
    dense = dense_error(row.experts, math.ceil(active * EXPERT_SIZE))
    found = {
        "error": routed,
        "dense error": dense,
        "information before": before,
        "information after": after,
        "experts per token": active,
        "dead experts": dead,
    }
    for name, value in found.items():
        record_property(name, round(value, 3))
    print(kind, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert routed < 0.7 and dead <= 0.5
    assert not row.wins or routed < 0.9 * dense
    assert not row.rises or after > before + 0.1


def test_a_selection_bias_balances_without_a_loss():
    violations, errors = {}, {}
    for rate in (0.0, 0.02):
        router = {"type": "top_k", "scoring": "sigmoid", "selection_bias": True}
        experts = {"type": "swiglu", "intermediate_size": EXPERT_SIZE}
        stack = Stack({"type": "moe", "num_experts": 8, "router": router, "experts": experts})
        errors[rate] = train(stack, rate, balance=0.0)
        _, routings, _ = error(stack)
        loads = [torch.bincount(routing.indices.flatten(), minlength=8).float() for routing in routings]
        violations[rate] = max(max_violation(load).item() for load in loads)
    print(violations, errors)
    assert violations[0.02] < 0.5 * violations[0.0]
    assert all(found < 0.5 * dense_error("swiglu", 2 * EXPERT_SIZE) for found in errors.values())
