"""What 16 bits do to a guarantee: weights that are scaled or folded are rounded, and then not quite the source's."""

from collections.abc import Iterable, Sequence

import torch

from .methods import Guarantee
from .methods.base import Exactness
from .recipes import Recipe

HALVES = (torch.bfloat16, torch.float16)


def after_rounding(
    guarantee: Guarantee,
    recipes: Iterable[Recipe],
    found: Sequence[torch.dtype | None],
    result: torch.dtype | None,
) -> Guarantee:
    """The guarantee that is left in the types of the sources and of the result.

    Args:
        guarantee: what holds in exact arithmetic.
        found: the sources' types, None where unknown.
        result: the type asked for; None keeps the sources'.
    """
    if guarantee.exactness is not Exactness.EXACT:
        return guarantee
    narrowed = result in HALVES and any(dtype != result for dtype in found if dtype is not None)
    if narrowed:
        reason = f"stored as {result}, which the sources are not"
    elif any(dtype in HALVES for dtype in found) and any(recipe.rounds() for recipe in recipes):
        reason = "weights of 16 bits are rounded once where factors are folded into them"
    else:
        return guarantee
    return Guarantee(Exactness.ROUNDING, f"{guarantee.reason}; {reason}")
