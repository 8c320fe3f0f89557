"""Batch normalisation that says how a router's logit stands among all others of its head (Monet, appendix A.3)."""

import torch
import torch.distributed as dist
from transformers import initialization as init

from ..losses import real_tokens
from ..parts import Part
from .recomputation import is_recomputed


class HeadBatchNorm(Part):
    """torch's `BatchNorm1d(H, affine=False)` over (token, key) pairs, without padding: (N, H, n) -> the same.

    In training the statistics are those of the batch over all processes, and move the running ones, which evaluation
    uses. A forward pass that checkpointing repeats moves nothing. No gradient: it only decides which keys are kept.
    """

    spans_batch = True
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, num_heads: int, momentum: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(num_heads))
        self.register_buffer("running_var", torch.ones(num_heads))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # nothing reads it; checkpoints have it

    def init_weights(self, std: float) -> None:
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)
        init.zeros_(self.num_batches_tracked)

    def forward(self, logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        mean, variance = (
            self.statistics(logits, token_mask) if self.training else (self.running_mean, self.running_var)
        )
        return (logits - mean[:, None]) * (variance[:, None] + self.eps).rsqrt()

    @torch.no_grad()
    def statistics(self, logits: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance (H,) of the real tokens' logits."""
        mask = None if token_mask is None else token_mask.to(logits.device)
        real = real_tokens(logits, mask)[..., None]  # (N, 1, 1)
        count = over_processes(real.sum() * logits.shape[-1]).clamp(min=1)
        mean = over_processes((logits * real).sum((0, 2))) / count
        squares = over_processes(((logits - mean[:, None]).square() * real).sum((0, 2)))
        if not is_recomputed():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((squares / (count - 1).clamp(min=1)).to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
        return mean, squares / count


def over_processes(part: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of what each of them has."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(part)
    return part
