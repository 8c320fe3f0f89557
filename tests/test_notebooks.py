"""The notebooks run from top to bottom, in a process of their own (`make notebooks`), and so does the example."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXAMPLE = ROOT / "examples" / "grpo_with_replay.py"
CODE = [*(pytest.param(path, path.stem, marks=pytest.mark.slow) for path in NOTEBOOKS), (EXAMPLE, EXAMPLE.stem)]


def source_of(path: Path) -> str:
    """The program in a file: of a notebook, its code cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path,name", CODE, ids=[*(path.stem for path in NOTEBOOKS), EXAMPLE.stem])
def test_it_runs(path, name, tmp_path):
    program = tmp_path / f"{name}.py"
    program.write_text(source_of(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "grpo_with_replay":
        assert "experts shared with the rollout: 100.0%" in done.stdout


def test_notebooks_are_stored_without_outputs():
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
