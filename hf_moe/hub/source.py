"""A module of ours as a list of top-level statements, each with the names that it binds and reads."""

import ast
import importlib.util
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = __name__.partition(".")[0]


class Import(NamedTuple):
    """`from module import name as alias`, or `import module as alias` when there is no name."""

    module: str
    name: str | None
    alias: str | None

    @property
    def bound(self) -> str:
        """The name that the import binds."""
        return self.alias or self.name or self.module.partition(".")[0]


@dataclass(frozen=True)
class Statement:
    """Source text as written, with the comments that stand above it."""

    node: ast.stmt
    text: str
    binds: frozenset[str]
    reads: frozenset[str]
    gap: int  # empty lines above

    @property
    def is_effect(self) -> bool:
        """Whether the statement is there for what it does and not for a name that it binds."""
        return not self.binds or isinstance(self.node, (ast.Expr, ast.For, ast.With, ast.AugAssign))

    @property
    def is_definition(self) -> bool:
        return isinstance(self.node, (ast.ClassDef, ast.FunctionDef))

    def rewritten(self, text: str) -> "Statement":
        """The same statement with other text."""
        return replace(self, text=text, reads=names(text)[1])


@dataclass
class Module:
    """One file: what it says, what it imports from this package (a whole module has no name in it) and from others."""

    name: str
    docstring: str = ""
    statements: list[Statement] = field(default_factory=list)
    ours: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # bound name -> module, name in it
    theirs: dict[str, Import] = field(default_factory=dict)


def names(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """The module-level names that `source` binds and reads, wherever inside functions and classes it reads them."""
    top = symtable.symtable(source, "source", "exec")
    reads = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = list(top.get_children())
    while tables:
        table = tables.pop()
        reads |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return frozenset(symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()), frozenset(reads)


@cache
def read_module(name: str) -> Module:
    """Parse one module of this package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"no source for {name}"
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    module = Module(name, ast.get_docstring(tree) or "")
    for node, piece, gap in _pieces(tree, text.splitlines()):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _add_import(module, node, package)
        else:
            module.statements.append(Statement(node, piece, *names(piece), gap))
    return module


def _pieces(tree: ast.Module, lines: list[str]) -> Iterator[tuple[ast.stmt, str, int]]:
    """Each statement with its text, from the comments above it to its end, and the empty lines above those."""
    end = 0
    for node in tree.body:
        above, stop = lines[end : (start := _first_line(node) - 1)], node.end_lineno or start
        gap = next((i for i, line in enumerate(above) if line.strip()), len(above))
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # the module's docstring
            yield node, "\n".join(lines[end + gap : stop]), gap
        end = stop


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _add_import(module: Module, node: ast.Import | ast.ImportFrom, package: str) -> None:
    for alias in node.names:
        if isinstance(node, ast.Import):
            assert alias.name.partition(".")[0] != PACKAGE, f"{module.name} must import from {PACKAGE} relatively"
            imported = Import(alias.name, None, alias.asname)
            module.theirs[imported.bound] = imported
        elif node.level:
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            submodule = f"{origin}.{alias.name}"
            is_module = node.module is None and importlib.util.find_spec(submodule) is not None
            module.ours[alias.asname or alias.name] = (submodule, None) if is_module else (origin, alias.name)
        else:
            imported = Import(str(node.module), alias.name, alias.asname)
            module.theirs[imported.bound] = imported
