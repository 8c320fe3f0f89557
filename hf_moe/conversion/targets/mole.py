"""MoLE: experts of a group share the input side of their gate and up projections, W_i = A_i B (`factoring.py`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...architectures import ARCHITECTURES
from ..dense import Dense
from ..factoring import Transpose, TruncatedBasis, factor
from ..neurons import FeedForward
from ..recipes import Recipe, Stack
from .base import Layout, Target


def _mole(dense: Dense, layout: Layout) -> dict[str, Any]:
    return {
        "moe_intermediate_size": layout.expert_width,
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "norm_topk_prob": layout.normalize,
    }


def _defaults(dense: Dense, layout: Layout) -> dict[str, Any]:
    """One group, and the least latent size that is exact for copies."""
    size = min(dense.fields["hidden_size"], layout.expert_width)
    return {"experts_per_group": layout.num_experts, "latent_size": size}


def _latent_experts(path: str, experts: Sequence[FeedForward], ingredients: Any) -> dict[str, Recipe]:
    """Group bases stacked in one tensor, everything else one tensor per expert."""
    config, path = ingredients.config, f"{path}.latent_experts"
    width, size, per_group = config.hidden_size, config.latent_size, config.experts_per_group
    shape, groups = (config.moe_intermediate_size, width), len(experts) // per_group

    def factored(name: str, matrices: list[Recipe], last: Callable[[Recipe], Recipe]) -> Iterator[tuple[str, Recipe]]:
        """`last` is what becomes of each factor."""
        bases, key = [], f"{path}.{name}_latent_proj"
        for group in range(groups):
            members = matrices[group * per_group : (group + 1) * per_group]
            basis, coordinates = factor(members, shape, size, config.initializer_range, f"{key}.{group}")
            bases.append(last(basis))
            for number, part in enumerate(coordinates, group * per_group):
                yield f"{path}.{number}.{name}_proj.weight", last(part)
        yield key, Stack(tuple(bases), (groups, *((width, size) if name == "down" else (size, width))))

    plan = dict(factored("gate", [expert.gate for expert in experts], lambda part: part))
    plan |= factored("up", [expert.up for expert in experts], lambda part: part)
    if config.factorize_down:  # the output side: W = P A, which is W^T = A^T P^T
        return plan | dict(factored("down", [Transpose(expert.down) for expert in experts], Transpose))
    return plan | {f"{path}.{number}.down_proj.weight": expert.down for number, expert in enumerate(experts)}


def _truncates(recipes: Mapping[str, Recipe]) -> str | None:
    """The singular values that different experts lose when their group's latent space is too small for all of them."""
    for recipe in recipes.values():
        for part in (recipe, *recipe.parts(), *(inner for outer in recipe.parts() for inner in outer.parts())):
            if isinstance(part, TruncatedBasis):
                return f"the latent space cuts the projections of a group of experts to rank {part.size}"
    return None


MOLE = Target(
    config_class=ARCHITECTURES["mole"][0],
    model_class=ARCHITECTURES["mole"][2],
    configure=_mole,
    defaults=_defaults,
    routed_experts=_latent_experts,
    truncates=_truncates,
)
