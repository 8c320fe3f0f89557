"""Every Python block of the README runs, in order, as a reader would paste it."""

import re
from pathlib import Path

import pytest

import hf_moe

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0])
def test_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_first_screen_names_the_two_commands():
    first_screen = "\n".join(README.read_text().splitlines()[:20])
    assert "make quickstart" in first_screen and "make test" in first_screen and BLOCKS


@pytest.mark.parametrize("table", ["ROUTERS", "EXPERTS", "FEED_FORWARDS", "BLOCKS"])
def test_the_page_of_parts_names_them_all(table):
    page = (README.parent / "docs" / "parts.md").read_text()
    assert [name for name in getattr(hf_moe, table) if f"`{name}`" not in page] == []


def test_the_table_names_every_architecture():
    assert [name for name in hf_moe.ARCHITECTURES if f"| `{name}` |" not in README.read_text()] == []


def test_the_readme_counts_the_parts():
    numbers = [len(table) for table in (hf_moe.ROUTERS, hf_moe.EXPERTS, hf_moe.FEED_FORWARDS, hf_moe.BLOCKS)]
    assert "{} routers, {} kinds of experts, {} feed-forwards and {} blocks".format(*numbers) in README.read_text()
