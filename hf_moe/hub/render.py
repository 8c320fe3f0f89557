"""The layout of a flat file: header, imports, a section for each module, registration with the Auto classes."""

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from typing import NamedTuple

from ..modeling import DecoderConfig
from .source import PACKAGE, Import, Module, Statement

WIDTH = 119
HEADER = '''"""{name} in one file: the decoder, and of its parts only those that this composition names.

Written by {package} {version} (`hf-moe show`); change the parts there, not here. Licence: Apache-2.0.
It needs torch and transformers; {package} itself need not be installed. Every name is defined before it is used, so
the architecture and the decoder stand at the end: start there and go up.

{order}

{blocks}
"""'''

REGISTER = "register"  # the function of `modeling` that makes an architecture known; `import hf_moe` calls it too
REGISTRATION = "Transformers finds these classes wherever this file is imported."


class Section(NamedTuple):
    """What is kept of one module, each statement with its place there."""

    module: Module
    statements: list[tuple[int, Statement]]


def render(config: DecoderConfig, sections: list[Section], imports: Iterable[Import], classes: Iterable[type]) -> str:
    """The whole file; it ends by registering the architecture's `classes`."""
    first, *others = map(_section, sections)
    arguments = "".join(f"\n    {registered.__name__}," for registered in classes)
    registration = f"{_banner('registration', REGISTRATION)}\n\n{REGISTER}({arguments}\n)"
    return "\n\n".join([_header(config), _imports(imports), "\n\n\n".join([first, *others, registration])]) + "\n"


def _header(config: DecoderConfig) -> str:
    order = f"The composition, repeated over the depth in the order {', '.join(config.block_pattern)}:"
    return HEADER.format(
        name=type(config).__name__.removesuffix("Config") + "ForCausalLM",
        package=PACKAGE,
        version=version(PACKAGE),
        order=textwrap.fill(order, WIDTH),
        blocks=json.dumps(config.blocks, indent=2),
    )


def _section(section: Section) -> str:
    """A module's docstring as a comment, then its statements as they were spaced, or two lines apart."""
    title = section.module.name.removeprefix(PACKAGE + ".").replace(".", "/")
    lines, before = [_banner(title, section.module.docstring)], None
    for index, statement in section.statements:
        adjacent = before is not None and index == before[0] + 1
        spread = before is None or statement.is_definition or before[1].is_definition
        lines += [""] * (statement.gap if adjacent and not spread else 2)
        lines.append(statement.text)
        before = index, statement
    return "\n".join(lines)


def _banner(title: str, text: str) -> str:
    """A comment that opens a section; a paragraph is wrapped again where `# ` makes it too wide."""
    paragraphs = text.split("\n\n")
    fits = [all(len(line) <= WIDTH - 2 for line in paragraph.splitlines()) for paragraph in paragraphs]
    wrapped = [item if fit else textwrap.fill(item, WIDTH - 2) for item, fit in zip(paragraphs, fits)]
    lines = [f"# {line}".rstrip() for line in "\n\n".join(wrapped).splitlines()]
    return "\n".join([f"# ---- {title} ".ljust(WIDTH, "-"), *lines])


def _imports(imports: Iterable[Import]) -> str:
    """The imports of all modules, sorted as isort does: standard library first, `import` before `from`."""
    groups = (
        [item for item in imports if item.module.partition(".")[0] in sys.stdlib_module_names],
        [item for item in imports if item.module.partition(".")[0] not in sys.stdlib_module_names],
    )
    return "\n\n".join(_import_group(group) for group in groups if group)


def _import_group(imports: Iterable[Import]) -> str:
    """A renamed name has a line to itself; the others of a module share one."""
    plain, lines = defaultdict(list), []
    for module, name, alias in imports:
        renamed = f" as {alias}" if alias else ""
        if name is None:
            lines.append((0, module.lower(), (), f"import {module}{renamed}"))
        elif alias:
            lines.append((1, module.lower(), _rank(name), f"from {module} import {name}{renamed}"))
        else:
            plain[module].append(name)
    for module, members in plain.items():
        members.sort(key=_rank)
        lines.append((1, module.lower(), _rank(members[0]), _from_import(module, members)))
    return "\n".join(line for *_, line in sorted(lines))


def _rank(name: str) -> tuple[bool, bool, str]:
    """Constants, then classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name.lower()


def _from_import(module: str, members: list[str]) -> str:
    line = f"from {module} import {', '.join(members)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {member}," for member in members), ")"])
