"""How the controllers move a selection bias: values, sums, and a closed loop that becomes even."""

import pytest
import torch

from hf_moe.modeling.controllers import CONTROLLERS, max_violation

LOADS = torch.tensor([4.0, 2.0, 2.0, 0.0])
KEYWORDS = {"step": 4, "num_zero_experts": 0, "true_share": 1.0}


def move(kind: str, loads: torch.Tensor = LOADS, rate: float = 0.1, **keywords) -> list[float]:
    return CONTROLLERS[kind](loads, rate, **{**KEYWORDS, **keywords}).tolist()


def test_values():
    assert move("sign") == pytest.approx([-0.1, 0, 0, 0.1])
    assert move("sign", torch.tensor([5.0, 1.0, 1.0, 1.0])) == pytest.approx([-0.1, 0.1, 0.1, 0.1])
    zero_mean = move("sign_zero_mean", torch.tensor([5.0, 1.0, 1.0, 1.0]))
    assert zero_mean == pytest.approx([-0.15, 0.05, 0.05, 0.05]) and sum(zero_mean) == pytest.approx(0, abs=1e-6)
    assert move("proportional") == pytest.approx([-0.025, 0, 0, 0.025])
    assert move("inverse_sqrt") == pytest.approx([-0.0125, 0, 0, 0.0125])
    assert move("inverse") == pytest.approx([-0.00625, 0, 0, 0.00625])


def test_longcat():
    """Two true experts of four; three slots of four are to be true, so each should get 3/8 of the assignments."""
    assert move("true_experts", num_zero_experts=2, true_share=0.75) == pytest.approx(
        [-0.0125, 0.0125, 0, 0], abs=1e-8
    )
    even = torch.tensor([3.0, 3.0, 2.0, 0.0])  # zero experts need not be even
    assert move("true_experts", even, num_zero_experts=2, true_share=0.75) == pytest.approx([0, 0, 0, 0], abs=1e-8)


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_even_loads_and_no_loads_move_nothing(kind):
    assert move(kind, torch.full((4,), 3.0)) == [0, 0, 0, 0]
    assert move(kind, torch.zeros(4)) == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["proportional", "inverse_sqrt", "inverse", "true_experts"])
def test_the_size_of_the_batch_does_not_matter(kind):
    assert move(kind, 7 * LOADS) == pytest.approx(move(kind))


def closed_loop(kind: str, rate: float, steps: int, num_zero_experts: int = 0, **keywords):
    """A router that favours some experts, and the bias that a controller gives it."""
    generator = torch.Generator().manual_seed(0)
    bias, offsets = torch.zeros(8), torch.linspace(1, -1, 8)
    history = []
    for step in range(1, steps + 1):
        scores = (torch.randn(512, 8, generator=generator) + offsets).softmax(-1)
        loads = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=8).float()
        bias += CONTROLLERS[kind](loads, rate, step=step, num_zero_experts=num_zero_experts, **keywords)
        history.append(loads)
    return torch.stack(history), bias


@pytest.mark.parametrize(
    "kind,rate", [("sign", 2e-3), ("sign_zero_mean", 2e-3), ("proportional", 0.2), ("inverse_sqrt", 1), ("inverse", 3)]
)
def test_a_closed_loop_becomes_even(kind, rate):
    loads, bias = closed_loop(kind, rate, 300)
    before, after = max_violation(loads[0]), max_violation(loads[-50:].mean(0))
    assert before > 1 and after < 0.1
    if kind == "sign_zero_mean":
        assert bias.sum().item() == pytest.approx(0, abs=1e-5)


def test_longcat_reaches_its_number_of_true_experts():
    loads, bias = closed_loop("true_experts", 0.2, 400, num_zero_experts=3, true_share=1.5 / 2)
    shares = loads[-50:].mean(0) / loads[-50:].mean(0).sum()
    assert 2 * shares[:5].sum().item() == pytest.approx(1.5, abs=0.02)
    assert max_violation(shares[:5]) < 0.1 and bias[5:].tolist() == [0, 0, 0]


def test_max_violation():
    assert max_violation(torch.full((4,), 2.0)) == 0
    assert max_violation(torch.tensor([8.0, 0, 0, 0])) == 3
    assert max_violation(torch.zeros(4)) == 0
