"""Read by every Python that `hf-moe run` starts: imports hf_moe right after transformers.

An environment may have a `sitecustomize` of its own, which this one hides: it is run first.
"""

import importlib.machinery
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).parent)


def run_hidden() -> None:
    """Run the `sitecustomize` that would have been found without us."""
    others = [path for path in sys.path if path != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


class RegisterAfter(Loader):
    """Loads transformers as its own loader does, then hf_moe."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then registers our architectures."""
        self.loader.exec_module(module)
        import hf_moe  # noqa: F401

    def __getattr__(self, name: str) -> Any:
        """What else the loader can do: transformers asks where its files are."""
        return getattr(self.loader, name)


class Watch(MetaPathFinder):
    """Waits for the import of transformers, once."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec of transformers with our loader; None for everything else."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("transformers")
        if spec is not None and spec.loader is not None:
            spec.loader = RegisterAfter(spec.loader)
        return spec


run_hidden()
sys.meta_path.insert(0, Watch())
