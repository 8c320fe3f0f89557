"""Latent experts: which factors are exact, and the best truncation where none are."""

import pytest
import torch
from dense_models import SIZES, dense_model, dense_models, logits, token_ids

from hf_moe.conversion import Options, plan_upcycling, upcycle

D = SIZES["hidden_size"]  # 32


def products(mixture, name):
    """(E, F, D) what the factors of the first layer multiply to, in float64."""
    experts = mixture.model.layers[0].mlp.latent_experts
    private, shared = getattr(experts, f"{name}_proj").double(), getattr(experts, f"{name}_latent_proj").double()
    shared = shared.repeat_interleave(experts.experts_per_group, 0)
    return shared @ private if name == "down" else private @ shared


def dense_matrix(model, name):
    return getattr(model.model.layers[0].mlp, f"{name}_proj").weight.double()


@pytest.mark.parametrize("factorize_down", [False, True])
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (40, {}),  # wider than the stream: B = I
        (20, {}),  # narrower: B = the copies' own matrix
        (20, {"latent_size": 24, "experts_per_group": 2}),  # rows to spare
        (40, {"latent_size": 36}),
    ],
)
def test_copies_are_exact_and_every_factor_learns(width, options, factorize_down):
    model = dense_model("llama", intermediate_size=width)
    options = {"num_experts": 4, "factorize_down": factorize_down, **options}
    mixture = upcycle(model, "mole", router_std=0.5, top_k=2, **options)
    torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)
    mixture.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    experts = mixture.model.layers[0].mlp.latent_experts
    for name, parameter in experts.named_parameters():
        learns = parameter.grad.abs() > 0
        if name in ("gate_proj", "up_proj"):  # no column of coordinates is cut off from learning
            assert learns.any((0, 1)).all(), name
        assert learns.any(), name


def test_different_experts_are_exact_where_the_latent_space_holds_all_of_them():
    models = dense_models("llama", 2, intermediate_size=12)
    mixture = upcycle(models, "mole", latent_size=24)  # 2 x 12 rows
    for name in ("gate", "up"):
        expected = torch.stack([dense_matrix(model, name) for model in models])
        assert torch.equal(products(mixture, name), expected)


def test_below_that_the_truncation_is_the_best_one():
    """The SVD of the stack in float64, cut to L; for the output side that of the matrices beside each other."""
    models = dense_models("llama", 4, intermediate_size=20)
    options = {"latent_size": 24, "experts_per_group": 2, "factorize_down": True}
    mixture = upcycle(models, "mole", **options)
    for name in ("gate", "up", "down"):
        found = products(mixture, name)
        for group in (0, 2):
            pair = [dense_matrix(model, name) for model in models[group : group + 2]]
            left, values, right = torch.linalg.svd(torch.cat(pair, 1 if name == "down" else 0), full_matrices=False)
            best = (left[:, :24] * values[:24]) @ right[:24]
            best = best.split(20, 1) if name == "down" else best.split(20, 0)
            torch.testing.assert_close(found[group : group + 2], torch.stack(best), atol=1e-5, rtol=0)
    plan = plan_upcycling(models, Options(target="mole", config_overrides=options))
    assert plan.guarantee.exactness == "needs training" and "to rank 24" in plan.guarantee.reason


def test_a_truncated_copy_is_no_longer_called_exact():
    model = dense_model("llama")
    for size, exactness in ((D, "exact"), (16, "approximate")):
        options = Options(target="mole", num_experts=2, config_overrides={"latent_size": size})
        assert plan_upcycling(model, options).guarantee.exactness == exactness
    assert (logits(upcycle(model, "mole", num_experts=2, latent_size=16)) - logits(model)).abs().max() > 0.01


def test_a_shared_basis_balances_both_factors():
    """Square roots of the singular values on both sides: B B^T is diagonal, and so is the sum of A_i^T A_i."""
    models = dense_models("llama", 2, intermediate_size=20)
    experts = upcycle(models, "mole", latent_size=16).model.layers[0].mlp.latent_experts
    basis, coordinates = experts.gate_latent_proj[0].double(), experts.gate_proj.double().flatten(0, 1)
    stack = torch.cat([dense_matrix(model, "gate") for model in models])
    diagonal = torch.linalg.svdvals(stack)[:16].diag()
    torch.testing.assert_close(basis @ basis.T, diagonal, atol=1e-4, rtol=0)
    torch.testing.assert_close(coordinates.T @ coordinates, diagonal, atol=1e-4, rtol=0)
