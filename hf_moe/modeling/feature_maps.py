"""Feature maps of linear attention: phi(q) . phi(k) takes the place of exp(q . k / sqrt(d)).

Letters: H heads, d feature dim (width of a head's queries and keys), F features that come out of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .parts import Part


class FeatureMap(Part):
    """`forward((B, T, H, d)) -> (B, T, H, F)`, in float32; `size` is F. A mixer has one for queries, one for keys."""

    size: int

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, enabled=False):  # features are summed over all of time
            return self.features(inputs.to(torch.promote_types(inputs.dtype, torch.float32)))

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        """phi of float32 inputs (float64 if the model is)."""
        raise NotImplementedError


def products(inputs: torch.Tensor) -> list[torch.Tensor]:
    """x_i x_j for i <= j by diagonals j - i = 0 ... d - 1: slices, so that nothing but x is kept for the gradient."""
    width = inputs.shape[-1]
    return [inputs[..., : width - offset] * inputs[..., offset:] for offset in range(width)]


class Taylor(FeatureMap):
    """Second-order Taylor series (BASED, https://arxiv.org/abs/2402.18668, equation 3).

        phi(q) . phi(k) = 1 + s + s^2 / 2,    s = q . k / sqrt(d)

    Exact with F = 1 + d + d (d + 1) / 2 features: a product of two entries stands once, not twice as in vec(x x^T).
    """

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__(num_heads, feature_dim)
        self.size = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs * self.feature_dim**-0.25
        squares, *others = products(inputs)
        return torch.cat([torch.ones_like(inputs[..., :1]), inputs, squares * 0.5**0.5, *others], -1)


class Rebased(FeatureMap):
    """A learnable parabola (ReBased, https://arxiv.org/abs/2402.10644, section 4): F = d (d + 1) / 2.

    phi(q) . phi(k) = (q' . k')^2 / d,    x' = gamma o layer_norm(x) + beta
    """

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__(num_heads, feature_dim)
        self.size = feature_dim * (feature_dim + 1) // 2
        self.gamma = nn.Parameter(torch.ones(feature_dim))
        self.beta = nn.Parameter(torch.zeros(feature_dim))

    def init_weights(self, std: float) -> None:
        init.ones_(self.gamma)
        init.zeros_(self.beta)

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.gamma.to(inputs.dtype), self.beta.to(inputs.dtype)
        normed = F.layer_norm(inputs, (self.feature_dim,), gamma, beta) * self.feature_dim**-0.25
        squares, *others = products(normed)
        return torch.cat([squares, *(x * 2**0.5 for x in others)], -1)


class Hedgehog(FeatureMap):
    """Learnable spikes that imitate a softmax (Hedgehog, https://arxiv.org/abs/2402.04347, section 4.2): F = 2 d.

        phi(x) = [softmax(x W_h), softmax(-x W_h)]

    W_h (d, d) of each head starts as the identity. As in LoLCATs each half has its own softmax, clamped at 1e-12.
    """

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__(num_heads, feature_dim)
        self.size = 2 * feature_dim
        self.weight = nn.Parameter(torch.eye(feature_dim).repeat(num_heads, 1, 1))

    def init_weights(self, std: float) -> None:
        init.copy_(self.weight, torch.eye(self.feature_dim).expand_as(self.weight))

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        projected = (inputs[..., None, :] @ self.weight.to(inputs.dtype))[..., 0, :]
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1).clamp(min=1e-12)


class Elu(FeatureMap):
    """`elu(x) + 1` (Linear Transformers, https://arxiv.org/abs/2006.16236, equation 7): F = d."""

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__(num_heads, feature_dim)
        self.size = feature_dim

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.elu(inputs) + 1


class Relu(FeatureMap):
    """`relu(x)` (T2R, https://arxiv.org/abs/2103.13076; its W is the mixer's projection): F = d."""

    def __init__(self, num_heads: int, feature_dim: int) -> None:
        super().__init__(num_heads, feature_dim)
        self.size = feature_dim

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.relu()


class Dpfp(FeatureMap):
    """Products of shifted parts, without parameters (DPFP, https://arxiv.org/abs/2102.11174, section 5.3): F = 2 d nu.

        phi(x) = [r o roll(r, 1), ..., r o roll(r, nu)],    r = relu([x, -x])

    Args:
        nu: how many shifts.
    """

    def __init__(self, num_heads: int, feature_dim: int, *, nu: int = 3) -> None:
        super().__init__(num_heads, feature_dim)
        self.nu, self.size = nu, 2 * feature_dim * nu

    @classmethod
    def check(cls, config: Any, *, nu: int, **options: Any) -> None:
        if nu < 1:
            raise ValueError(f"nu={nu}: a DPFP feature map needs at least one shift.")

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        parts = torch.cat([inputs, -inputs], -1).relu()
        return torch.cat([parts * parts.roll(shift, -1) for shift in range(1, self.nu + 1)], -1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "taylor": Taylor,
    "hedgehog": Hedgehog,
    "elu": Elu,
    "relu": Relu,
    "dpfp": Dpfp,
    "rebased": Rebased,
}
