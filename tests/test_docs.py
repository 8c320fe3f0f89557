"""The documents: their Python runs or at least imports what exists, their commands parse, their pages can be built."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer

import hf_moe
from hf_moe.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = ("index.md", "publishing.md")  # as a reader would paste them; the README in test_readme.py


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Every `hf-moe` line in every block of shell, without its comment."""
    # what a shell does with the output is not ours
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return sorted({re.split(r"  #| > | \| ", line)[0].strip() for line in lines if line.startswith("hf-moe ")})


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(ROOT / "docs" / name, "python"):
        exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_imports_from_us_exists(page: Path):
    for line in re.findall(r"(?m)^from hf_moe.*? import [\w, ]+$", "\n".join(blocks(page, "python"))):
        (node,) = ast.parse(line).body
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        module = importlib.import_module(node.module)
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command: str):
    """A known command, known flags, arguments of the right kind; nothing is run."""
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    found.make_context(name, arguments, resilient_parsing=False)


def hooks() -> ModuleType:
    """The hook of the site, without mkdocs, which only the extra `docs` brings."""
    text = (ROOT / "docs" / "site" / "hooks.py").read_text().replace("from mkdocs.structure.files import File\n", "")
    module = ModuleType("hooks")
    module.__file__ = str(ROOT / "docs" / "site" / "hooks.py")
    exec(compile(text, module.__file__, "exec"), vars(module))
    return module


def test_every_architecture_has_a_page():
    site = hooks()
    known = {name: classes[0] for name, classes in {**hf_moe.ARCHITECTURES, **hf_moe.PUBLISHED}.items()}
    for name in ("bam", "hf_moe", "llama_moe"):
        text = site.page(name, known[name])
        assert "## Composition" in text and "parameters" in text and "tests/" in text
    assert "<https://arxiv.org/abs/2408.08274>" in site.page("bam", known["bam"])
    assert all(known[name].__doc__ for name in known)
