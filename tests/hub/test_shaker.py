"""The flattener keeps what is needed, and what a module does when it is imported."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_moe.hub.flatten import Shaker
from hf_moe.hub.source import names, read_module

TOY = {
    "__init__.py": "",
    "effects.py": "REGISTRY = {}\nREGISTRY['x'] = 1\n\n\ndef unused():\n    return 2\n",
    "base.py": (
        '"""What the others build on."""\n\nimport math\nimport os\n\nlogger = print\n\n\n'
        "def needed():\n    return logger(math.pi)\n\n\ndef unused():\n    return os.sep\n"
    ),
    "top.py": (
        "from . import effects as _effects\nfrom .base import needed, unused\n\nlogger = print\n\n# why\n"
        "answer = needed()  # and what\n"
    ),
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A small package."""
    for file, text in TOY.items():
        (tmp_path / "toy_package").mkdir(exist_ok=True)
        (tmp_path / "toy_package" / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_package"
    for module in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[module]
    read_module.cache_clear()


def test_keeps_needs_and_effects_and_nothing_else(toy: str):
    __import__(f"{toy}.top")
    shaker = Shaker(set())
    shaker.need_module(f"{toy}.top")
    kept = {section.module.name: [item.text for _, item in section.statements] for section in shaker.sections()}
    assert kept == {
        f"{toy}.effects": ["REGISTRY = {}", "REGISTRY['x'] = 1"],
        f"{toy}.base": ["logger = print", "def needed():\n    return logger(math.pi)"],
        f"{toy}.top": ["# why\nanswer = needed()  # and what"],
    }
    assert set(shaker.imports) == {"math"}


@pytest.mark.parametrize(
    ("source", "binds", "reads"),
    [
        ("x = a", {"x"}, {"a"}),
        ("x['k'] = a", set(), {"x", "a"}),
        ("def f(b: c = d):\n    e = g\n    return e", {"f"}, {"c", "d", "g"}),
        (
            "@a\nclass B(c):\n    d = e\n\n    def f(self):\n        return super().f(g)",
            {"B"},
            {"a", "c", "e", "g", "super"},
        ),
        ("def f():\n    import a\n    return [a for b in c]", {"f"}, {"c"}),
    ],
)
def test_names(source: str, binds: set[str], reads: set[str]):
    assert names(source) == (binds, reads)
