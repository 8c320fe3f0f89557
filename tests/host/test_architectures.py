"""Transformers' own model tests over the entries of `architectures.py`: one class for each."""

import os

from architectures import entry, entry_names
from conftest import CHOSEN
from harness import make_test_class

for name in os.environ.get(CHOSEN, "").split() or entry_names():
    globals()[f"Test_{name}"] = make_test_class(entry(name), __name__)
