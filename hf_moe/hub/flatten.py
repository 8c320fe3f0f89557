"""Write one architecture as one file: the decoder and only the parts that its config names.

Composition is the source; the single file is a view of it, for reading and for repositories that must run without us.
"""

import ast
import builtins
import importlib
import json
from collections.abc import Iterator
from typing import Any

from ..architectures import ARCHITECTURES, CLASSIFIERS
from ..modeling import BLOCKS, DecoderConfig
from ..modeling.parts import Part, resolve, walk
from ..published import AMBIGUOUS, PUBLISHED
from .render import REGISTER, Section, render
from .source import PACKAGE, Import, Statement, read_module

# model type -> config, decoder and heads
CLASSES: dict[str, tuple[Any, ...]] = (
    {name: (*classes, *CLASSIFIERS[name]) for name, classes in ARCHITECTURES.items()} | PUBLISHED | AMBIGUOUS
)


def flatten(config: DecoderConfig) -> str:
    """The source of one file that defines `config`'s class and its models, and imports nothing of ours.

    Args:
        config: an instance of one of our config classes; its composition says which parts the file needs.
    """
    if config.model_type not in CLASSES:
        raise ValueError(f"Unknown model type {config.model_type!r}; choose from {sorted(CLASSES)}.")
    classes = CLASSES[config.model_type]
    config_class = classes[0]
    # the default composition stays too: Transformers builds it whenever it prints or saves a config
    shaker = Shaker(used_parts(config) | used_parts(config_class()))
    shaker.need(f"{PACKAGE}.modeling", REGISTER)
    shaker.need_module(config_class.__module__)
    return render(config, list(shaker.sections()), shaker.imports.values(), classes)


def used_parts(config: DecoderConfig) -> set[type[Part]]:
    """The classes of all parts that a config's blocks name."""
    return {part for spec in config.blocks.values() for _, part, _ in walk(BLOCKS, resolve(BLOCKS, spec))}


def prune(module: str, statement: Statement, used: set[type[Part]]) -> Statement:
    """A table without the parts that no block names; any other statement as it is."""
    match statement.node:
        case ast.Assign(value=ast.Dict(values=values)) | ast.AnnAssign(value=ast.Dict(values=values)):
            table = getattr(importlib.import_module(module), next(iter(statement.binds), ""), None)
        case _:
            return statement
    if table is None or not all(isinstance(part, type) and issubclass(part, Part) for part in table.values()):
        return statement
    kept = [(key, ast.unparse(value)) for (key, part), value in zip(table.items(), values) if part in used]
    head, opening, _ = statement.text.partition("= {")
    entries = "".join(f"\n    {json.dumps(key)}: {value}," for key, value in kept)
    return statement.rewritten(head + opening + entries + ("\n}" if kept else "}"))


class Shaker:
    """Keeps the statements that are needed, and those that they need in turn."""

    def __init__(self, used: set[type[Part]]) -> None:
        self.used = used
        self.imports: dict[str, Import] = {}
        self._bodies: dict[str, list[Statement]] = {}  # in the order in which Python would run the modules
        self._kept: dict[str, set[int]] = {}

    def need_module(self, name: str) -> None:
        """Keep all of a module."""
        self._read(name)
        for index in range(len(self._bodies[name])):
            self._keep(name, index)

    def need(self, module: str, name: str) -> None:
        """Keep what binds a name in a module."""
        self._read(module)
        self._need(module, name)

    def sections(self) -> Iterator[Section]:
        """What is kept of each module, so that every name is bound before it is read."""
        bound: dict[str, str] = {}
        for name, body in self._bodies.items():
            kept = [(index, body[index]) for index in sorted(self._kept.get(name, ()))]
            kept = [(index, statement) for index, statement in kept if not _is_repeated(statement, bound)]
            if kept:
                yield Section(read_module(name), kept)

    def _read(self, name: str) -> None:
        """Read a module after those that it imports; imports between modules have no cycles."""
        if name in self._bodies:
            return
        for origin, _ in read_module(name).ours.values():
            self._read(origin)
        self._bodies[name] = [prune(name, statement, self.used) for statement in read_module(name).statements]

    def _need(self, module: str, name: str) -> None:
        self._run(module)
        source = read_module(module)
        if binding := [index for index, statement in enumerate(self._bodies[module]) if name in statement.binds]:
            for index in binding:
                self._keep(module, index)
        elif name in source.ours:
            origin, there = source.ours[name]
            assert there == name, f"{module} must import {name} from {origin} under its own name"
            self._need(origin, name)
        elif name in source.theirs:
            imported = self.imports.setdefault(name, source.theirs[name])
            assert imported == source.theirs[name], f"{name} means {imported} and {source.theirs[name]}"
        else:
            assert hasattr(builtins, name), f"{module} reads {name}, which nothing binds"

    def _keep(self, module: str, index: int) -> None:
        self._run(module)
        if index not in self._kept[module]:
            self._kept[module].add(index)
            for name in self._bodies[module][index].reads:
                self._need(module, name)

    def _run(self, module: str) -> None:
        """Keep what a module does when it is imported: registrations, and imports of modules for their effect."""
        if module in self._kept:
            return
        self._kept[module] = set()
        for origin, there in read_module(module).ours.values():
            if there is None:
                self._run(origin)
        for index, statement in enumerate(self._bodies[module]):
            if statement.is_effect:
                self._keep(module, index)


def _is_repeated(statement: Statement, bound: dict[str, str]) -> bool:
    """Modules may hold the same line, such as a logger; they may not bind one name to different things."""
    repeated = not statement.is_effect and statement.binds <= bound.keys()
    for name in statement.binds:
        assert bound.setdefault(name, statement.text) == statement.text, f"two modules bind {name}"
    return repeated
