"""Experts: what a chosen token goes through."""

from .base import Experts
from .latent import Latent
from .swiglu import Swiglu

EXPERTS: dict[str, type[Experts]] = {
    "swiglu": Swiglu,  # pyright: ignore[reportAssignmentType] - the decorator is annotated as returning nn.Module
    "latent": Latent,
}
