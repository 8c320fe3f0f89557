"""Prepares a pytest process for Transformers' own model tests.

python -m pytest tests/host --architecture=bam -m fast     one architecture, in about a minute
python -m pytest tests/host -rs                            everything, and every skip with its reason
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import sdist

HERE = Path(__file__).resolve().parent
collect_ignore = ["overlay"]
CHOSEN = "HF_MOE_HOST_ARCHITECTURES"  # what --architecture said, for the test file
SLOW_PARTS = {"is_training_test", "is_tensor_parallel_test", "is_expert_parallel_test", "is_fsdp_test"}

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--architecture=NAME`, as often as needed."""
    parser.addoption(
        "--architecture",
        action="append",
        metavar="NAME",
        help="run only this entry of architectures.py (may be repeated; the control, qwen3_moe, runs only when named)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Notes what to run, finds the sdist, and puts our `tests` package, which overlays it, before everything else."""
    os.environ[CHOSEN] = " ".join(config.getoption("--architecture") or [])
    try:
        os.environ[sdist.VARIABLE] = str(sdist.tests_folder())
    except (OSError, ValueError, subprocess.SubprocessError, tarfile.TarError) as error:
        raise pytest.UsageError(f"No copy of transformers' own tests, and no way to download it: {error}") from error
    overlay = str(HERE / "overlay")
    sys.path.insert(0, overlay)
    # the fork server of the distributed tests is a fresh interpreter and does not inherit sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (overlay, os.environ.get("PYTHONPATH")) if p)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `fast` what Transformers does not mark as a training or distributed test."""
    for item in items:
        if not SLOW_PARTS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("fast")
