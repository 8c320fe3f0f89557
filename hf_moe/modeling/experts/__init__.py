"""Experts: what a chosen token goes through."""

from .base import Experts
from .compressed import Compressed
from .feature_modulated import FeatureModulated
from .identity import Identity
from .latent import Latent
from .mlp import MlpExperts
from .swiglu import Swiglu
from .ternary import Ternary

EXPERTS: dict[str, type[Experts]] = {
    "swiglu": Swiglu,  # pyright: ignore[reportAssignmentType] - the decorator is annotated as returning nn.Module
    "latent": Latent,
    "mlp": MlpExperts,  # pyright: ignore[reportAssignmentType]
    "feature_modulated": FeatureModulated,
    "ternary": Ternary,
    "identity": Identity,
    "compressed": Compressed,
}
