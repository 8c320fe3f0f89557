"""mkdocs hook: one page per architecture and the list of them, written from the code each time the site is built.

A page says what the code says: module docstring (paper), class docstring (options), fields and defaults, the
composition, parameters, and the tests that name the type.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import hf_moe
from hf_moe.modeling import DecoderConfig

ROOT = Path(__file__).parents[2]
FOLDER = "architectures"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    known = {**{name: classes[0] for name, classes in hf_moe.ARCHITECTURES.items()}}
    known |= {name: classes[0] for name, classes in hf_moe.PUBLISHED.items()}
    for model_type, config_class in known.items():
        path = f"{FOLDER}/{model_type}.md"
        files.append(File.generated(config, path, content=page(model_type, config_class)))
    files.append(File.generated(config, f"{FOLDER}/index.md", content=index(known)))
    return files


def index(known: dict[str, type[DecoderConfig]]) -> str:
    """A row per architecture."""
    lines = ["# Architectures\n", "| type | what it is | parameters | active |", "|---|---|---:|---:|"]
    for model_type, config_class in known.items():
        counts = hf_moe.count_parameters(config_class())
        title = sys.modules[config_class.__module__].__doc__.strip().splitlines()[0]
        lines.append(
            f"| [`{model_type}`]({model_type}.md) | {title} | {short(counts.total)} | {short(counts.active)} |"
        )
    return "\n".join([*lines, "\nSizes are those of the default config.\n"])


def page(model_type: str, config_class: type[DecoderConfig]) -> str:
    """Everything about one architecture."""
    config, document = config_class(), sys.modules[config_class.__module__].__doc__
    counts = hf_moe.count_parameters(config)
    sections = [
        f"# {model_type}\n",
        f"{linked(document.strip())}\n",
        f"`{config_class.__name__}` by default: {counts.total:,} parameters, {counts.active:,} of them per token.\n",
        "## Options\n",
        f"{prose(config_class.__doc__)}\n",
        table(config_class),
        "\n## Composition\n",
        f"Repeated over the depth: {', '.join(f'`{name}`' for name in dict.fromkeys(config.block_pattern))}.\n",
        f"```json\n{json.dumps(config.blocks, indent=2)}\n```\n",
        f"`hf-moe show {model_type}` prints the whole model as one file.\n",
        "## What was verified\n",
        verified(model_type, config_class),
    ]
    return "\n".join(sections)


def table(config_class: type[DecoderConfig]) -> str:
    """The fields that the class adds or changes, with their defaults."""
    common = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    lines = ["| field | default |", "|---|---|"]
    for field in dataclasses.fields(config_class):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.name not in common or common[field.name] != field.default:
            lines.append(f"| `{field.name}` | `{default!r}` |")
    return "\n".join(lines)


def verified(model_type: str, config_class: type[DecoderConfig]) -> str:
    """The files of the tests that name the type or its classes."""
    name = config_class.__name__.removesuffix("Config")
    pattern = re.compile(rf"\b{re.escape(model_type)}\b|\b{name}(Config|ForCausalLM)\b")
    folders = ("published", "hub", "conversion")
    files = [path for folder in folders for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    found = [path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    lines = [f"* `{each}`" for each in found]
    return "\n".join([*lines, "* and, for its parts, the contract suite `tests/contract`\n"])


def prose(text: str) -> str:
    """A docstring as Markdown: a list instead of indented arguments."""
    text = re.sub(r"\n {4}", "\n", text.strip())
    return (
        re.sub(r"(?m)^ {4}(\w+(?:, \w+)*): ", r"* `\1`: ", text).replace("Args:\n", "\n").replace("\n        ", "\n  ")
    )


def linked(text: str) -> str:
    """Addresses as links."""
    return re.sub(r"(https://\S+?)(?=[),;]|\.?(?:\s|$))", r"<\1>", text)


def short(number: int) -> str:
    """7.2 B, 110 M."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"
