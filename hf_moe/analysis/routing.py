"""How a model's routers use their experts on given texts.

Letters: B rows, T tokens, N = B T, E experts to choose from (those without parameters stand behind the others), K
chosen per token, M domains.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling import DecoderConfig, MoeLayer, RouterCall, moe_layers, scores, watched_routers
from ..modeling.controllers import max_violation
from .figures import coactivation, jensen_shannon_of_all, normalized_entropy, shares, specialization


@dataclass(frozen=True)
class LayerRouting:
    """What one MoE layer did; a layer with several routers (`chain_of_experts`) pools their choices.

    Args:
        name: path of the layer in the model.
        num_experts, num_zero_experts: with and without parameters.
        choices: router decisions: tokens, times the routers of the layer.
        experts_per_token: mean number of experts that a decision used.
        loads: (E,) share of the assignments that went to each expert.
        max_vio: `max(c) / mean(c) - 1`; 0 is even.
        entropy: of the loads, divided by log E; 1 is even.
        dead_experts: numbers of the experts that were never chosen.
        confidence: mean over the decisions of the largest score, as a share of the sum of a token's scores.
        router_entropy: mean over the decisions of the entropy of those shares, divided by log E.
        coactivation: (E, E) `P(j | i)`: of the tokens that chose i, the share that chose j too; 0 on the diagonal.
        domain_loads: domain -> (E,) loads of its tokens alone.
        specialization: domain -> (E,) its load of an expert, divided by the mean of all domains' loads of it.
        divergence: Jensen-Shannon divergence of the domains' loads, 0 (alike) to 1 (disjoint); None for one domain.
    """

    name: str
    num_experts: int
    num_zero_experts: int
    choices: int
    experts_per_token: float
    loads: list[float]
    max_vio: float
    entropy: float
    dead_experts: list[int]
    confidence: float
    router_entropy: float
    coactivation: list[list[float]]
    domain_loads: dict[str, list[float]]
    specialization: dict[str, list[float]]
    divergence: float | None


@dataclass(frozen=True)
class RoutingFacts:
    """Routing of a whole model.

    Args:
        tokens: domain -> tokens that were read, without padding.
        layers: in order of depth.
        not_called: paths of MoE layers that text does not pass through: multi-token prediction, images.
    """

    tokens: dict[str, int]
    layers: list[LayerRouting]
    not_called: list[str]


class Counts:
    """What one layer has done so far; on the CPU, in int64 and float64."""

    def __init__(self, num_choices: int, num_domains: int) -> None:
        self.loads = torch.zeros(num_domains, num_choices, dtype=torch.long)
        self.pairs = torch.zeros(num_choices, num_choices, dtype=torch.long)
        self.choices = self.scored = 0
        self.confidence = self.entropy = 0.0

    def add(self, domain: int, call: RouterCall, ours: bool) -> None:
        """Add one call of a router, without padding and without slots that a router of ours leaves unused."""
        mask = call.token_mask
        real = torch.ones_like(call.indices[:, 0], dtype=torch.bool) if mask is None else mask
        indices = call.indices[real]
        used = call.weights[real] != 0 if ours else torch.ones_like(indices, dtype=torch.bool)
        size = self.loads.shape[1]
        self.loads[domain] += torch.bincount(indices[used], minlength=size).cpu()
        chosen = torch.zeros(len(indices), size + 1, device=indices.device)
        chosen = chosen.scatter_(1, indices.where(used, size), 1.0)[
            :, :size
        ]  # unused slots go to a column of their own
        self.pairs += (chosen.T @ chosen).round().long().cpu()  # exact in float32 below 2^24 tokens
        self.choices += len(indices)
        self.add_scores(scores(call)[real].double())

    def add_scores(self, given: torch.Tensor) -> None:
        """Add the scores (N, E) of the same call; a token whose scores are all 0 says nothing about confidence."""
        totals = given.sum(-1, keepdim=True)
        distributions = (given / totals)[totals[:, 0] > 0]
        self.scored += len(distributions)
        self.confidence += distributions.amax(-1).sum().item() if len(distributions) else 0.0
        self.entropy += normalized_entropy(distributions).sum().item()


@torch.no_grad()
def expert_statistics(
    model: PreTrainedModel,
    domains: Mapping[str, Iterable[Sequence[int]]],
    *,
    max_tokens: int = 16384,
    max_length: int = 512,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> RoutingFacts:
    """Run texts through a model and say how its routers used their experts.

    Args:
        model: of a type that `hf_moe.moe_layers` knows; it runs in evaluation mode, on the device where it is.
        domains: name -> documents as token ids. Loads over all domains weigh every token alike.
        max_tokens: read of each domain; the rest is left out.
        max_length: tokens that are read at once; longer documents are cut into pieces.
        batch_size: pieces that are read at once.
        progress: called with the number of tokens after every batch.

    Raises:
        ValueError: no MoE layers, or ones that are not known or cannot be watched; a domain without tokens.
    """
    layers = list(moe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers whose routing could be measured.")
    if min(max_tokens, max_length, batch_size) < 1 or not domains:
        raise ValueError("expert_statistics needs a domain, and max_tokens, max_length and batch_size of at least 1.")
    read = {name: list(pieces(documents, max_tokens, max_length)) for name, documents in domains.items()}
    if empty := [name for name, found in read.items() if not found]:
        raise ValueError(f"There are no tokens in {', '.join(map(repr, empty))}.")
    counts = {layer.name: Counts(layer.num_experts + layer.num_zero_experts, len(read)) for layer in layers}
    run_domains(model, list(read.values()), counts, batch_size, progress)
    tokens = {name: sum(map(len, found)) for name, found in read.items()}
    called = [layer for layer in layers if counts[layer.name].choices]
    not_called = [layer.name for layer in layers if not counts[layer.name].choices]
    return RoutingFacts(tokens, [summarize(layer, counts[layer.name], list(read)) for layer in called], not_called)


def pieces(documents: Iterable[Sequence[int]], max_tokens: int, max_length: int) -> Iterator[Sequence[int]]:
    """Documents cut to `max_length` tokens, and to `max_tokens` together."""
    left = max_tokens
    for document in documents:
        if left <= 0:
            return
        document = document[:left]
        left -= len(document)
        yield from (document[start : start + max_length] for start in range(0, len(document), max_length))


def run_domains(
    model: PreTrainedModel,
    domains: list[list[Sequence[int]]],
    counts: Mapping[str, Counts],
    batch_size: int,
    progress: Callable[[int], Any] | None,
) -> None:
    """Read everything once and count."""
    ours, was_training = isinstance(model.config, DecoderConfig), model.training
    model.eval()
    try:
        for number, texts in enumerate(domains):
            with watched_routers(model, partial(count, counts, number, ours)):
                remaining = iter(sorted(texts, key=len))  # equal lengths together: little padding
                while batch := list(islice(remaining, batch_size)):
                    model.base_model(**padded(batch, model.device), use_cache=False)
                    if progress is not None:
                        progress(sum(map(len, batch)))
    finally:
        model.train(was_training)


def count(counts: Mapping[str, Counts], domain: int, ours: bool, call: RouterCall) -> None:
    """After every call of a router."""
    counts[call.layer.name].add(domain, call, ours)


def padded(batch: list[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids (B, T) and mask of some pieces, padded on the right."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(batch):
        ids[row, : len(piece)] = torch.tensor(list(piece))
        mask[row, : len(piece)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def summarize(layer: MoeLayer, counts: Counts, names: list[str]) -> LayerRouting:
    """The figures of one layer, which was called."""
    pooled, by_domain = counts.loads.sum(0), shares(counts.loads)
    relative = specialization(by_domain)
    return LayerRouting(
        name=layer.name,
        num_experts=layer.num_experts,
        num_zero_experts=layer.num_zero_experts,
        choices=counts.choices,
        experts_per_token=pooled.sum().item() / counts.choices,
        loads=shares(pooled).tolist(),
        max_vio=max_violation(pooled.double()).item(),
        entropy=normalized_entropy(shares(pooled)).item(),
        dead_experts=(pooled == 0).nonzero().flatten().tolist(),
        confidence=counts.confidence / max(counts.scored, 1),
        router_entropy=counts.entropy / max(counts.scored, 1),
        coactivation=coactivation(counts.pairs).tolist(),
        domain_loads={name: row.tolist() for name, row in zip(names, by_domain, strict=True)},
        specialization={name: row.tolist() for name, row in zip(names, relative, strict=True)},
        divergence=jensen_shannon_of_all(by_domain) if len(names) > 1 else None,
    )
