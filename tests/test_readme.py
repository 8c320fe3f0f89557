"""Every Python block of the README runs, in order, as a reader would paste it."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0])
def test_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_first_screen_names_the_two_commands():
    first_screen = "\n".join(README.read_text().splitlines()[:20])
    assert "make quickstart" in first_screen and "make test" in first_screen and BLOCKS
