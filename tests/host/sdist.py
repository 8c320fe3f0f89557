"""Downloads the sdist of the installed transformers, whose tests this suite runs, and prints the path of its tests."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VARIABLE = "TRANSFORMERS_SDIST_TESTS"
REPOSITORY = Path(__file__).resolve().parents[2]


def tests_folder() -> Path:
    """The sdist's `tests/`: what the environment variable names, otherwise the cached copy, otherwise a download."""
    if given := os.environ.get(VARIABLE):
        return _checked(Path(given))
    version = importlib.metadata.version("transformers")
    folder = _cache() / f"transformers-{version}"
    if not folder.exists():
        _download(version, folder)
    return _checked(folder / "tests")


def _cache() -> Path:
    """`$XDG_CACHE_HOME/hf_moe`, or `.cache` (which git ignores) in the repository."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "hf_moe" if home else REPOSITORY / ".cache"


def _checked(tests: Path) -> Path:
    """`tests` itself, if it is the `tests/` folder of a transformers sdist."""
    if not (tests / "test_modeling_common.py").is_file():
        raise ValueError(
            f"{tests} holds no test_modeling_common.py, so it is not the tests/ folder of a transformers sdist; "
            f"delete it or set {VARIABLE}."
        )
    return tests


def _download(version: str, folder: Path) -> None:
    """Unpacks the tests of transformers `version` beside `folder`, then renames: no half-written folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        # without build isolation pip asks the installed setuptools for the metadata and downloads no build tools
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
        subprocess.run([sys.executable, "-m", *command, f"transformers=={version}", "-d", temporary], check=True)
        with tarfile.open(Path(temporary, f"transformers-{version}.tar.gz")) as archive:
            wanted = [m for m in archive.getmembers() if m.name.startswith(f"{folder.name}/tests/")]
            archive.extractall(temporary, members=wanted, filter="data")
        os.rename(Path(temporary, folder.name), folder)


if __name__ == "__main__":
    print(tests_folder())
