"""What the feed-forwards of dense models, and so the routers in their place, read on texts.

Letters: B batch, T time, G groups of texts, N tokens, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .sources import Source
from .texts import Batch

MOST_KEPT = 1 << 28  # entries of hidden states that are kept over all layers: 1 GiB
TOKENS_PER_ROW = 64  # kept in any case, if there are so many


class Heard:
    """What the feed-forwards of some layers read on the true tokens of some batches, averaged over the sources.

    The mixture's attention is the average of the sources', which nobody can run before it is written. The average of
    what several sources read on a token is what their average reads, to first order in their differences.

    Args:
        batches: what will be heard, in this order, once per source.
        layers: numbers of the layers.
        width: D.
        num_sources: how many models will run.
        kept: tokens whose vectors are kept, chosen at random.
        seed: of that choice.

    Attributes:
        tokens: layer -> (N, D) the vectors of the chosen tokens, in float32.
    """

    def __init__(
        self, batches: Sequence[Batch], layers: Sequence[int], width: int, num_sources: int, kept: int, seed: int
    ) -> None:
        groups = max(batch.group or 0 for batch in batches) + 1
        total = sum(int(batch.attention_mask.sum()) for batch in batches)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        self.chosen = order[:kept].sort().values
        self.tokens = {layer: torch.zeros(len(self.chosen), width) for layer in layers}
        self.sums = {layer: torch.zeros(groups, width, dtype=torch.float64) for layer in layers}
        self.embedded = torch.zeros(groups, width, dtype=torch.float64)
        self.num_tokens, self.num_documents = torch.zeros(groups), torch.zeros(groups)
        self.num_sources, self.before = num_sources, 0

    def start(self, batch: Batch, before: int) -> None:
        """A batch comes, after so many tokens of the same source."""
        self.batch, self.mask, self.before = batch, batch.attention_mask.bool(), before

    def feed_forward(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a feed-forward: (B, T, D) is what its router will read."""
        states = args[0] if args else next(iter(kwargs.values()))
        states = states.detach().cpu()[self.mask].float()  # (tokens of the batch, D)
        self.sums[layer][self.batch.group or 0] += states.sum(0, dtype=torch.float64) / self.num_sources
        ends = torch.tensor([self.before, self.before + len(states)])
        first, last = torch.searchsorted(self.chosen, ends).tolist()
        self.tokens[layer][first:last] += states[self.chosen[first:last] - self.before] / self.num_sources

    def final_norm(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """After the last norm: (B, T, D), of which a document's mean is its embedding."""
        states, mask, group = output.detach().cpu().double(), self.mask[..., None], self.batch.group or 0
        documents = (states * mask).sum(1) / mask.sum(1)
        self.embedded[group] += documents.sum(0) / self.num_sources
        self.num_documents[group] += len(documents) / self.num_sources
        self.num_tokens[group] += int(self.mask.sum()) / self.num_sources

    def means(self, layer: int) -> torch.Tensor:
        """(G, D) mean over the tokens of each group, in float64."""
        return self.sums[layer] / self.num_tokens[:, None]

    def embeddings(self) -> torch.Tensor:
        """(G, D) mean over the documents of each group, in float64."""
        return self.embedded / self.num_documents[:, None]


def listen(
    sources: Sequence[Source], batches: Sequence[Batch], layers: Sequence[int], count: int, seed: int = 0
) -> Heard:
    """Run every source over the batches, one after the other.

    Args:
        sources: of one shape.
        batches: the same for all.
        layers: whose feed-forwards to hear.
        count: distinct router rows; enough tokens for so many clusters are kept.
        seed: of the choice which ones.
    """
    width: int = sources[0].config.hidden_size
    kept = max(TOKENS_PER_ROW * count, MOST_KEPT // (len(layers) * width))
    heard = Heard(batches, layers, width, len(sources), kept, seed)
    with tqdm(total=len(batches) * len(sources), desc="Calibrating", unit="batch", delay=5) as progress:
        for source in sources:
            run(source, batches, heard, progress.update)
    return heard


@torch.no_grad()
def run(source: Source, batches: Sequence[Batch], heard: Heard, advance: Callable[[], Any]) -> None:
    """Run one source over the batches."""
    model = source.load()
    decoder: Any = model.base_model
    with evaluating(model), hooks(decoder, heard):
        before = 0
        for batch in batches:
            heard.start(batch, before)
            ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            before += int(batch.attention_mask.sum())
            advance()


@contextmanager
def hooks(decoder: Any, heard: Heard) -> Iterator[None]:
    """Let `heard` hear what a decoder computes."""
    handles = [decoder.norm.register_forward_hook(heard.final_norm)]
    for layer in heard.tokens:
        hook = partial(heard.feed_forward, layer)
        handles.append(decoder.layers[layer].mlp.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; a model of the user's is given back as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
