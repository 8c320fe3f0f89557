"""Texts for calibration: from Python or files, in groups, as batches of tokens of a source's tokenizer.

Letters: B batch, T time.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .sources import Source, first_line

TEXT_FILES = (".txt", ".jsonl")
Document = str | list[int]
WANTED = (
    "pass texts, lists of token ids, files (.txt with a blank line between documents, .jsonl with a string"
    ' {"text": ...} per line), or a list or dict of such, one per group'
)


@dataclass(frozen=True)
class Batch:
    """Some documents, or pieces of long ones, padded on the right.

    Args:
        input_ids: (B, T) token ids, 0 where there is padding.
        attention_mask: (B, T) 1 for tokens, 0 for padding.
        group: number of the group of texts that all of them belong to; None for common texts.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    group: int | None = None


@dataclass(frozen=True)
class Texts:
    """What `data` holds.

    Args:
        names: of the groups, for errors.
        groups: the documents of each.
        common: whether they are one common set rather than one group of several.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[Document, ...], ...]
    common: bool


def read_data(data: Any) -> Texts:
    """Find out what `data` holds; files are read.

    Args:
        data: common texts: strings, lists (or 1-D tensors) of token ids, rows with `text` or `input_ids` such as those
            of a dataset, a 2-D tensor of token ids, or one file. Groups of texts: a list or dict of such. A string
            that ends in .txt or .jsonl is a file; several files are one group each.

    Raises:
        ValueError: nothing there, a mixture of kinds, a missing or empty file, or a line that is no JSON or no text.
    """
    if isinstance(data, Texts):
        return data
    if isinstance(data, str | Path):
        return Texts((str(data),), (read_group(str(data), data),), True)
    if isinstance(data, Mapping):
        names, items = [str(name) for name in data], list(data.values())
        common = False
    elif isinstance(data, Iterable):
        items = list(data)
        are_documents = [is_document(item) for item in items]
        common = all(are_documents) or (len(items) == 1 and is_file(items[0]))
        if any(are_documents) and not common:
            raise ValueError(f"data mixes documents with groups or files of documents: {WANTED}")
        names = [str(item) if is_file(item) else f"group {number}" for number, item in enumerate(items)]
    else:
        raise ValueError(f"data={data!r} cannot be read: {WANTED}")
    if not items:
        raise ValueError(f"data is empty: {WANTED}")
    if common:
        source = items[0] if is_file(items[0]) else items
        return Texts(("data",), (read_group("data", source),), True)
    groups = [read_group(name, item) for name, item in zip(names, items, strict=True)]
    return Texts(tuple(names), tuple(groups), False)


def is_file(item: Any) -> bool:
    """Whether an entry of `data` names a file."""
    if isinstance(item, str):
        return "\n" not in item and item.endswith(TEXT_FILES)
    return isinstance(item, Path)


def is_document(item: Any) -> bool:
    """Whether an entry of `data` is one document: a text, token ids or a row that holds either."""
    if isinstance(item, Mapping):
        return "text" in item or "input_ids" in item
    if isinstance(item, torch.Tensor):
        return item.dim() == 1
    if isinstance(item, str):
        return not is_file(item)
    return isinstance(item, list | tuple) and bool(item) and all(isinstance(token, int) for token in item)


def read_group(name: str, given: Any) -> tuple[Document, ...]:
    """The documents of one group, which is a file or some documents."""
    if isinstance(given, str | Path):
        return tuple(read_file(Path(given).expanduser()))
    if not isinstance(given, Iterable) or not all(map(is_document, given := list(given))):
        raise ValueError(f"data: {name} cannot be read: {WANTED}")
    documents = [document for each in given if (document := plain(each))]
    if not documents:
        raise ValueError(f"data: {name} is empty")
    return tuple(documents)


def plain(document: Any) -> Document:
    """A text or a list of token ids."""
    if isinstance(document, Mapping):
        document = document["text"] if "text" in document else document["input_ids"]
    return document if isinstance(document, str) else [int(token) for token in document]


def read_file(path: Path) -> list[Document]:
    """The documents of a .txt or .jsonl file."""
    if path.suffix not in TEXT_FILES:
        raise ValueError(f"data: {path} must be one of {list(TEXT_FILES)}: {WANTED}")
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"data: there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"data: cannot read {path}: {first_line(error)}") from error
    if path.suffix == ".txt":
        documents: list[Document] = [text.strip() for text in re.split(r"\n\s*\n", content)]
    else:
        lines = enumerate(content.split("\n"), 1)
        documents = [read_line(path, number, line) for number, line in lines if line.strip()]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"data: {path} holds no text")
    return documents


def read_line(path: Path, number: int, line: str) -> str:
    """The text of one line of a .jsonl file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: {path}, line {number}: no JSON: {first_line(error)}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f'data: {path}, line {number}: needs a string "text", has {found}')
    return row["text"]


def make_batches(source: Source, data: Any, max_length: int = 512, batch_size: int = 8) -> list[Batch]:
    """Cut texts into pieces of at most `max_length` tokens (or what the model can hold) and put equals together.

    Every document goes through the source's tokenizer as that does by default, so it starts with the token that the
    model expects, if any; the later pieces of a long one do not. Padding needs no pad token: the mask hides it.

    Args:
        source: whose tokenizer to use; one in memory has none and takes token ids only.
        data: as `read_data` takes it.
        max_length: tokens of a piece.
        batch_size: pieces of a batch, all of one group.

    Raises:
        ValueError: what `read_data` refuses, no tokenizer, a group without tokens, ids that the model does not have.
    """
    texts = read_data(data)
    length, config = max_length, source.config
    if (most := getattr(config, "max_position_embeddings", None)) is not None:
        length = min(length, most)
    batches = []
    for number, (name, documents) in enumerate(zip(texts.names, texts.groups, strict=True)):
        ids = tokenize(source, documents)
        check_ids(name, ids, config.vocab_size)
        pieces = [each[start : start + length] for each in ids for start in range(0, len(each), length)]
        pieces.sort(key=len)
        for start in range(0, len(pieces), batch_size):
            batches.append(pad(pieces[start : start + batch_size], None if texts.common else number))
    return batches


def tokenize(source: Source, documents: Iterable[Document]) -> list[list[int]]:
    """Token ids of every document."""
    documents = list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    if not texts:
        return [document for document in documents if not isinstance(document, str)]
    if source.folder is None:
        raise ValueError(f"{source.label} is in memory and has no tokenizer: give data as lists of token ids")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:  # a tokenizer class may raise anything
        raise ValueError(f"{source.label}: cannot load its tokenizer for data: {first_line(error)}") from error
    encoded = iter(tokenizer(texts, verbose=False)["input_ids"])
    return [next(encoded) if isinstance(document, str) else document for document in documents]


def check_ids(name: str, documents: list[list[int]], vocab_size: int) -> None:
    """Refuse a group without tokens, and tokens that the model does not have."""
    used = {token for document in documents for token in document}
    if not used:
        raise ValueError(f"data: {name} has no tokens")
    if min(used) < 0 or max(used) >= vocab_size:
        wrong = min(used) if min(used) < 0 else max(used)
        raise ValueError(f"data: {name} has token {wrong}, the model's vocabulary has {vocab_size}")


def pad(pieces: list[list[int]], group: int | None) -> Batch:
    """Pieces as one batch."""
    ids = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        mask[row, : len(piece)] = 1
    return Batch(ids, mask, group)


def examples(batches: Iterable[Batch]) -> list[dict[str, list[int]]]:
    """The pieces one by one, without padding: what `training.warm_up_routers` takes."""
    return [
        {"input_ids": ids[mask.bool()].tolist()}
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
