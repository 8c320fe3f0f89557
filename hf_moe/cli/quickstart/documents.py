"""Documents for the quickstart: collect them, and split them into training and held-out text without leaks.

A document belongs to one domain. Documents of one origin (the code and the docstrings of one file) and documents that
repeat each other's lines form a group, and a group is never divided between training and held-out text.
"""

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path

from tqdm.auto import tqdm

HELD_OUT = 0.1  # share of each domain's characters
# Tests, third-party code, generated tables, and the file that stores the topics (they are documents of their own).
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
LINE_LENGTH = 25  # shorter lines (`return self`) say nothing about where a text comes from
COMMON_LINE = 20  # a line of more documents than this is boilerplate
SHARED_LINES = 0.2  # documents that share this part of the shorter one's lines belong together


@dataclass(frozen=True)
class Document:
    """One text: `origin` names the file or the topic it was taken from."""

    origin: str
    domain: str
    text: str


def collect(data_dir: Path | None, limit: int | None = None) -> list[Document]:
    """The user's documents, or those of Python's standard library; at most about `limit` characters per domain."""
    documents = standard_library(limit) if data_dir is None else user_folders(data_dir)
    if limit is None:
        return documents
    kept, size = [], Counter()
    for document in sorted(documents, key=lambda d: fingerprint(d.origin)):
        if size[document.domain] < limit:
            text = document.text[: limit // 10]  # one large file must not be all there is
            kept.append(replace(document, text=text))
            size[document.domain] += len(text)
    return kept


def user_folders(data_dir: Path) -> list[Document]:
    """`data_dir/<domain>/**/*.txt`, checked: two domains or more, two files with text or more in each."""
    expected = "expected one folder per domain, at least two of them, each with at least two *.txt files"
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir {data_dir} is not a folder: {expected}.")
    folders = sorted(f for f in data_dir.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        found = ", ".join(f.name for f in folders) or "none"
        raise ValueError(f"--data-dir {data_dir} holds too few domains (found: {found}): {expected}.")
    documents = []
    for folder in folders:
        texts = {file: read_text(file) for file in sorted(folder.rglob("*.txt"))}
        texts = {file: text for file, text in texts.items() if text.strip()}
        if len(texts) < 2:
            raise ValueError(
                f"Domain {folder.name!r} of --data-dir {data_dir} has {len(texts)} *.txt files with text: {expected} "
                "(training and held-out text are different files)."
            )
        documents += [Document(str(f.relative_to(data_dir)), folder.name, text) for f, text in texts.items()]
    return documents


def read_text(file: Path) -> str:
    """A text file of the user's, or an error that names it."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def standard_library(limit: int | None = None) -> list[Document]:
    """`code` (modules without their docstrings) and `prose` (docstrings, language reference): nothing to download."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    files = sorted(f for f in files if not f.relative_to(root).parts[0].startswith(("_sysconfigdata", "config-")))
    if limit is not None:  # files have 12 thousand characters of code on average
        files = sorted(files, key=lambda f: fingerprint(f.relative_to(root).as_posix()))[: limit // 4000]
    documents = [Document(f"topic/{name}", "prose", text) for name, text in sorted(topics.items())]
    for file in tqdm(files, desc="Reading the standard library", unit="file"):
        with tokenize.open(file) as stream:
            source = stream.read()
        code, docstrings = split_docstrings(source)
        origin = file.relative_to(root).as_posix()
        documents += [Document(origin, "code", code)] if code.strip() else []
        documents += [Document(origin, "prose", "\n\n".join(docstrings))] if docstrings else []
    return documents


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Python source without its docstrings, and the docstrings: every character is in one domain only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        tree = ast.parse(source)
    lines, docstrings = source.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            first = node.body[0]
            docstrings.append((first.lineno, text))
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    return "".join(lines), [text for _, text in sorted(docstrings)]


def fingerprint(name: str) -> str:
    """A shuffled order that is the same on every machine."""
    return hashlib.sha256(name.encode()).hexdigest()


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: whole groups, about `HELD_OUT` of each domain's characters held out."""
    whole = sizes(documents)
    room = Counter({domain: int(HELD_OUT * size) for domain, size in whole.items()})
    train, held_out = [], []
    for members in groups(documents):
        fits = all(size <= room[domain] for domain, size in sizes(members).items())
        (held_out if fits else train).append(members)
        if fits:
            room.subtract(sizes(members))
    for domain in whole:  # few large files: the smallest of them is held out, though it is more than `HELD_OUT`
        short = room[domain] > HELD_OUT * whole[domain] / 2
        of_domain = sorted((group for group in train if sizes(group)[domain]), key=lambda g: sizes(g)[domain])
        if short and len(of_domain) > 1:
            train.remove(of_domain[0])
            held_out.append(of_domain[0])
    return list(chain.from_iterable(train)), list(chain.from_iterable(held_out))


def sizes(documents: Iterable[Document]) -> Counter[str]:
    """Characters per domain."""
    total = Counter[str]()
    for document in documents:
        total[document.domain] += len(document.text)
    return total


def groups(documents: list[Document]) -> list[list[Document]]:
    """Documents that must stay together, in the order of their fingerprints."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    same: dict[str, int] = {}  # origin or text -> the first document that has it
    for i, document in enumerate(documents):
        for key in (document.origin, document.text):
            parent[root(i)] = root(same.setdefault(key, i))
    for i, j in repetitions(documents):
        parent[root(i)] = root(j)
    members = defaultdict(list)
    for i, document in enumerate(documents):
        members[root(i)].append(document)
    return sorted(members.values(), key=lambda group: min(fingerprint(d.origin) for d in group))


def repetitions(documents: list[Document]) -> Iterator[tuple[int, int]]:
    """Pairs of documents that share `SHARED_LINES` of the shorter one's lines."""
    where, length = defaultdict(list), []
    for i, document in enumerate(documents):
        lines = {line for raw in document.text.splitlines() if len(line := raw.strip()) >= LINE_LENGTH}
        length.append(len(lines))
        for line in lines:
            where[line].append(i)
    shared = Counter(chain.from_iterable(combinations(w, 2) for w in where.values() if 1 < len(w) <= COMMON_LINE))
    for (i, j), count in shared.items():
        shorter = min(length[i], length[j])
        if count >= SHARED_LINES * shorter and (count > 1 or shorter == 1):
            yield i, j
