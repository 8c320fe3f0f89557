"""Token mixers: how information moves along the sequence."""

from .attention import Attention
from .base import Mixer
from .soft_mixture_of_attention import SoftMixtureOfAttention

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "soft_mixture_of_attention": SoftMixtureOfAttention,
}
