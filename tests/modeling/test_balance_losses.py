"""Every balance loss at perfect balance and at collapse, against loops in float64, with padding and packed rows."""

import pytest
import torch

from hf_moe import HfMoeConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.losses import BALANCE_LOSSES, importance_loss, sequence_loss, switch_loss

EXPERTS = 4
AT_BALANCE = {"switch": 1, "averaged_null": 1, "sequence": 1, "global": 1, "importance": 0, "score_importance": 0}
AT_COLLAPSE = {**dict.fromkeys(AT_BALANCE, EXPERTS), "importance": EXPERTS - 1, "score_importance": EXPERTS - 1}
AT_BALANCE["importance_load"], AT_COLLAPSE["importance_load"] = 0, 2 * EXPERTS


def value(kind: str, scores, indices, weights, context=None, loads=None, num_zero_experts=0) -> float:
    context = context or ForwardContext(shape=(2, len(scores) // 2))
    loss = BALANCE_LOSSES[kind](scores, indices, weights, context, loads=loads, num_zero_experts=num_zero_experts)
    assert loss.shape == () and loss.dtype == torch.float32
    return loss.item()


def random_routing(tokens: int = 12, k: int = 2, scoring: str = "softmax"):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    weights, indices = scores.topk(k)
    weights[::5, -1] = 0  # an idle slot
    return scores, indices, weights


def naive(scores, indices, weights, groups, mask):
    """`E sum f P` of every group of tokens, weighted by its real tokens; plain loops in float64."""
    total, number = 0.0, 0
    for group in sorted(set(groups)):
        tokens = [n for n in range(len(scores)) if groups[n] == group and mask[n]]
        counts, means = [0] * EXPERTS, [0.0] * EXPERTS
        for n in tokens:
            for index, weight in zip(indices[n].tolist(), weights[n].tolist()):
                counts[index] += weight != 0
            row = scores[n].double().tolist()
            for e in range(EXPERTS):
                means[e] += row[e] / sum(row) / len(tokens)
        if tokens:
            total += len(tokens) * EXPERTS * sum(c / sum(counts) * m for c, m in zip(counts, means))
            number += len(tokens)
    return total / number


def test_every_loss_is_here():
    assert BALANCE_LOSSES.keys() == AT_BALANCE.keys() == AT_COLLAPSE.keys()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_perfect_balance(kind, scoring):
    for k in (1, 2):
        rows = torch.arange(2 * EXPERTS)[:, None]
        indices = (rows + torch.arange(k)) % EXPERTS  # in each row of EXPERTS tokens as well
        scores = torch.full((2 * EXPERTS, EXPERTS), 1 / EXPERTS if scoring == "softmax" else 0.7)
        assert value(kind, scores, indices, torch.full((2 * EXPERTS, k), 0.3)) == pytest.approx(AT_BALANCE[kind])


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_collapse(kind):
    scores = torch.eye(EXPERTS)[torch.zeros(6, dtype=torch.long)]
    arguments = (scores, torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    assert value(kind, *arguments) == pytest.approx(AT_COLLAPSE[kind])


def test_rows_that_collapse_onto_different_experts():
    """Balanced as a batch, not within each sequence: what the kinds disagree about."""
    chosen = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    arguments = (torch.eye(EXPERTS)[chosen], chosen[:, None], torch.ones(8, 1))
    context = ForwardContext(shape=(4, 2))
    assert value("switch", *arguments, context) == pytest.approx(1)
    assert value("sequence", *arguments, context) == pytest.approx(EXPERTS)
    one_row = [part[:2] for part in arguments]  # a micro-batch of the first row, whose step is balanced
    assert value("switch", *one_row, ForwardContext(shape=(1, 2))) == pytest.approx(EXPERTS)
    assert value("global", *one_row, ForwardContext(shape=(1, 2)), loads=torch.full((4,), 2.0)) == pytest.approx(1)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_against_loops(scoring):
    routing = random_routing(scoring=scoring)
    mask = torch.ones(12).bool()
    mask[[3, 4, 11]] = False
    context = ForwardContext(shape=(3, 4), token_mask=mask)
    rows = [n // 4 for n in range(12)]
    assert value("switch", *routing, context) == pytest.approx(naive(*routing, [0] * 12, mask), rel=1e-5)
    assert value("sequence", *routing, context) == pytest.approx(naive(*routing, rows, mask), rel=1e-5)


def test_packed_sequences_are_sequences():
    routing = random_routing()
    packed = ForwardContext(shape=(1, 12), segments=torch.tensor([[0] * 5 + [1] * 3 + [2] * 4]))
    expected = naive(*routing, [0] * 5 + [1] * 3 + [2] * 4, [True] * 12)
    assert value("sequence", *routing, packed) == pytest.approx(expected, rel=1e-5)
    parts = [
        value("sequence", *(part[a:b] for part in routing), ForwardContext(shape=(1, b - a)))
        for a, b in ((0, 5), (5, 8), (8, 12))
    ]
    assert sum(p * n / 12 for p, n in zip(parts, (5, 3, 4))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_padding_does_not_count(kind):
    scores, indices, weights = random_routing(8)
    padded = [torch.cat([part, part.flip(0)]) for part in (scores, indices, weights)]
    order = torch.tensor([0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11])  # two rows of six, the last two of each are padding
    mask = torch.tensor([1, 1, 1, 1, 0, 0] * 2).bool()
    context = ForwardContext(shape=(2, 6), token_mask=mask)
    expected = value(kind, scores, indices, weights, ForwardContext(shape=(2, 4)))
    assert value(kind, *(part[order] for part in padded), context) == pytest.approx(expected, rel=1e-5)
    assert value(kind, scores, indices, weights, ForwardContext(shape=(2, 4), token_mask=torch.zeros(8).bool())) == 0


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_the_gradient(kind):
    """Down the gradient of the scores, a lopsided router becomes less so; loads themselves have no gradient."""
    logits = (torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()
    offsets = torch.tensor([1.0, 0.0, 0.0, 0.0])
    context = ForwardContext(shape=(1, 64))

    def loss() -> torch.Tensor:
        scores = (logits + offsets).softmax(-1)
        weights, indices = scores.topk(2)
        return BALANCE_LOSSES[kind](scores, indices, weights, context, loads=None, num_zero_experts=0)

    before = loss()
    before.backward()
    assert logits.grad is not None and logits.grad.sum(0)[0] > 0  # less of the favourite
    logits.data -= 20 * logits.grad
    assert loss() < before


def test_which_null_expert_is_chosen_does_not_matter():
    scores = torch.tensor([[0.4, 0.2, 0.1, 0.3]]).expand(6, -1)
    for indices in ([0, 1, 2, 2, 2, 2], [0, 1, 3, 3, 3, 3], [0, 1, 2, 2, 3, 3]):
        arguments = (scores, torch.tensor(indices)[:, None], torch.ones(6, 1))
        # f = (1/6, 1/6, 2/6, 2/6): each null has the mean of the nulls' load
        expected = 4 * (0.4 / 6 + 0.2 / 6 + 0.1 * 2 / 6 + 0.3 * 2 / 6)
        assert value("averaged_null", *arguments, num_zero_experts=2) == pytest.approx(expected)
    one_null = (torch.eye(4)[torch.full((6,), 3)], torch.full((6, 1), 3), torch.ones(6, 1))
    assert value("averaged_null", *one_null, num_zero_experts=2) == pytest.approx(4 / 2)
    assert value("switch", *one_null, num_zero_experts=2) == pytest.approx(4)


def test_importance_is_the_squared_coefficient_of_variation():
    values = torch.tensor([[1.0, 0.0], [0.5, 0.5], [9.0, 9.0]])
    mask = torch.tensor([True, True, False])
    assert importance_loss(values, mask).item() == pytest.approx(0.5**2 / 1.0**2)  # 1.5 and 0.5


def test_pure_functions_take_gradients():
    scores, indices, weights = random_routing()
    scores.requires_grad_()
    (switch_loss(scores, indices, weights) + sequence_loss(scores, indices, weights, torch.arange(12) // 4)).backward()
    assert scores.grad is not None and scores.grad.abs().sum() > 0


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"router_balance_loss='micro' is unknown; choose from \['averaged_null'"):
        HfMoeConfig(router_balance_loss="micro")
