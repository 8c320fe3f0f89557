"""How far a mixture is from its source: both run whole, in float32, on the same tokens.

Letters: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .sources import Source

PROBE_TOKENS = (4, 32)  # (B, T)


@dataclass(frozen=True)
class Measured:
    """Differences between a result and one source, in float32.

    Args:
        max_logit_difference, mean_logit_difference: absolute.
        largest_logit: of the source, absolute: what the differences are to be compared with.
        kl: mean KL(source || result) in nats per token.
        agreement: share of tokens with the same most likely successor.
    """

    max_logit_difference: float
    mean_logit_difference: float
    largest_logit: float
    kl: float
    agreement: float


def probe(source: Source, seed: int = 0) -> torch.Tensor:
    """(B, T) random token ids of a source's vocabulary."""
    config: Any = source.config
    return torch.randint(config.vocab_size, PROBE_TOKENS, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def float32_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) of a model that stays as it is."""
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float().cpu()


def measure(source: Source, folder: Path, input_ids: torch.Tensor | None = None) -> Measured:
    """Compare the model in a folder with a source on a local folder or the hub; both are loaded whole, one by one.

    Args:
        source: where the source is; one in memory cannot be brought to float32 without changing it.
        folder: of the result.
        input_ids: (B, T) tokens; by default random ones from a fixed seed.

    Raises:
        ValueError: a source in memory, or logits that are NaN or infinite.
    """
    if source.weights is None:
        raise ValueError(f"{source.label}: a source in memory cannot be verified; save it and pass its folder")
    input_ids = probe(source) if input_ids is None else input_ids
    logits = []
    for place in (source.weights, folder):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, use_safetensors=True).eval()
        logits.append(float32_logits(model, input_ids))
        del model
    theirs, ours = logits
    for label, found in ((source.label, theirs), ("the result", ours)):
        if not found.isfinite().all():
            raise ValueError(f"{label}: logits on the probe are NaN or infinite")
    difference = (ours - theirs).abs()
    expected, found = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return Measured(
        max_logit_difference=difference.max().item(),
        mean_logit_difference=difference.mean().item(),
        largest_logit=theirs.abs().max().item(),
        kl=(expected.exp() * (expected - found)).sum(-1).mean().item(),
        agreement=(theirs.argmax(-1) == ours.argmax(-1)).double().mean().item(),
    )
