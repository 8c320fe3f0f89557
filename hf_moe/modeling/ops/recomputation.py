"""Tells a forward pass from its repetition under activation checkpointing."""

import torch
from torch.compiler import is_compiling


def is_recomputed() -> bool:
    """Whether this code runs inside a backward pass: checkpointing repeats a forward pass there, with or without
    reentry. What counts, such as an expert's load or a running mean, must not count the same tokens twice.

    A compiled graph is traced once for both, and counts what it is given.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1
