"""What `pip install` brings: our package with its data files, no tests, nothing else at the top level."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_what_the_wheel_holds(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entries = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_moe"}
    assert not [name for name in names if "test_" in name or "/tests/" in name]
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_moe").rglob("*.py")}
    assert source | {"hf_moe/py.typed", "hf_moe/hub/card_template.md"} <= names
    assert "hf-moe = hf_moe.cli.main:main" in entries and "[vllm.general_plugins]" in entries
