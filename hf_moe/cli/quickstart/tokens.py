"""Tokens for the quickstart: a tokenizer, packed windows per domain, and samples of them to train on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .documents import HELD_OUT, Document, fingerprint, sizes, split

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Corpus:
    """Packed windows of tokens, per domain, for training and held out."""

    tokenizer: PreTrainedTokenizerFast
    train: dict[str, Dataset]
    held_out: dict[str, Dataset]

    @property
    def domains(self) -> list[str]:
        """The domains' names, in a fixed order."""
        return list(self.train)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that every text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING, model_max_length=max_length
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, window: int, name: str) -> Dataset:
    """Documents joined by the end-of-text token and cut into windows of equal length; a last short one is dropped."""

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}  # pyright: ignore

    # A fingerprint of our own: `datasets` would hash the tokenizer to name a cache file, and nothing is cached.
    encoded = Dataset.from_dict({"text": texts}).map(
        tokens, batched=True, batch_size=32, remove_columns="text", keep_in_memory=True, desc=f"Tokenizing {name}",
        new_fingerprint=fingerprint(name)[:16],
    )  # fmt: skip
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = np.fromiter(chain.from_iterable(chain(ids, [end]) for ids in encoded["tokens"][:]), dtype=np.int32)
    rows = stream[: len(stream) // window * window].reshape(-1, window)
    features = Features({name: List(Value("int32"), length=window) for name in ("input_ids", "labels")})
    return Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features)


def build_corpus(documents: list[Document], vocab_size: int, window: int, held_out_windows: int) -> Corpus:
    """Split, tokenize and pack: the held-out text of a domain is at most `held_out_windows`, spread evenly."""
    train_documents, held_out_documents = split(documents)
    domains = sorted({document.domain for document in documents})
    share = min(sizes(train_documents)[domain] for domain in domains)  # the tokenizer sees as much of every domain
    tokenizer = train_tokenizer(
        chain.from_iterable(head(train_documents, domain, share) for domain in domains), vocab_size, 8 * window
    )
    packed: dict[str, dict[str, Dataset]] = {"training": {}, "held-out": {}}
    for kind, part in (("training", train_documents), ("held-out", held_out_documents)):
        for domain in domains:
            texts = [document.text for document in part if document.domain == domain]
            rows = pack(texts, tokenizer, window, f"{domain} ({kind})") if texts else None
            if rows is None or len(rows) == 0:
                raise ValueError(too_little(domain, kind, window))
            packed[kind][domain] = rows
    held_out = {domain: spread(rows, held_out_windows) for domain, rows in packed["held-out"].items()}
    return Corpus(tokenizer, packed["training"], held_out)


def head(documents: list[Document], domain: str, characters: int) -> Iterator[str]:
    """The first documents of a domain, about this many characters."""
    for document in documents:
        if document.domain == domain and characters > 0:
            characters -= len(document.text)
            yield document.text


def too_little(domain: str, kind: str, window: int) -> str:
    """What to tell somebody whose domain does not fill a window."""
    return (
        f"Domain {domain!r} has too little {kind} text: expected at least {window} tokens to train on and as many in "
        f"other files to hold out ({HELD_OUT:.0%} of a domain; files that repeat each other stay together). Add more "
        "*.txt files."
    )


def spread(rows: Dataset, number: int) -> Dataset:
    """At most `number` rows, evenly spaced."""
    number = min(number, len(rows))
    return rows.select([i * len(rows) // number for i in range(number)])


def sample(corpus: Corpus, shares: dict[str, float], windows: int, seed: int) -> Dataset:
    """Training rows: `shares` of the domains, each read to its end before any row comes again."""
    parts, start, total = [], 0, 0.0
    for i, (domain, share) in enumerate(sorted(shares.items())):
        total += share
        end = round(windows * total)
        rows, rng = corpus.train[domain], np.random.default_rng([seed, i])
        order = chain.from_iterable(rng.permutation(len(rows)) for _ in range((end - start) // len(rows) + 1))
        parts.append(rows.select(list(order)[: end - start]))
        start = end
    return concatenate_datasets(parts).shuffle(seed=seed)
