"""WSM: merge the checkpoints of a run with a constant rate, instead of decaying it (https://arxiv.org/abs/2507.17634)."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

COPIED = (".json", ".jinja", ".model", ".txt", ".py")  # config, tokenizer, index: everything but states
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def merge_coefficients(decay: Sequence[float]) -> list[float]:
    """Coefficients c_0 ... c_k of k + 1 checkpoints that stand for a decay (§3.2, theorem 1).

    Between two checkpoints lies a block of gradients; w_j is what a decay would multiply the j-th of them with.
    `c_0 = 1 - w_1`, `c_j = w_j - w_{j+1}`, `c_k = w_k`: they sum to 1.

    Args:
        decay: w_1 >= ... >= w_k, from at most 1 down to at least 0. 1, 0.8, 0.6, 0.4, 0.2 gives 0 and five times 0.2.

    Raises:
        ValueError: no multipliers, or such that rise or leave 0 to 1.
    """
    bounds = [1.0, *decay, 0.0]
    if not decay or any(first < second for first, second in pairwise(bounds)):
        raise ValueError(f"decay={list(decay)} must fall, from at most 1 to at least 0.")
    return [first - second for first, second in pairwise(bounds)]


def merge_checkpoints(
    folders: Sequence[str | Path], output: str | Path, coefficients: Sequence[float] | None = None
) -> Path:
    """Average checkpoints of one run, tensor by tensor, in float32.

    Selection biases and other buffers are averaged like weights; integers are taken from the last checkpoint.

    Args:
        folders: Trainer's checkpoints, in order of time; all with the same tensors.
        output: new folder, which appears when it is complete; it gets the last checkpoint's config and tokenizer.
        coefficients: one per folder, that sum to 1: `merge_coefficients`. None: all the same, WSM's "mean".

    Returns:
        `output`.

    Raises:
        ValueError: no folders, other numbers of coefficients, tensors that differ in name or shape.
        FileExistsError: `output` is there.
    """
    paths, target = [Path(folder) for folder in folders], Path(output)
    weights = [1 / len(paths)] * len(paths) if coefficients is None and paths else list(coefficients or ())
    if not paths or len(weights) != len(paths) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"{len(paths)} checkpoints need as many coefficients that sum to 1, got {weights}.")
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another output, or remove it.")
    places = [tensor_files(path) for path in paths]
    for path, found in zip(paths, places):
        if different := sorted(places[-1].keys() ^ found.keys()):
            raise ValueError(f"{path} and {paths[-1]} differ in {different[0]!r}: they are not of one run.")
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    names = list(places[-1])
    for file in tqdm(sorted(set(places[-1].values())), desc="Merging checkpoints", unit="file", delay=5):
        merged = {name: merged_tensor(name, places, weights) for name in names if places[-1][name] == file}
        save_file(merged, draft / file.name, metadata={"format": "pt"})
    for extra in paths[-1].iterdir():
        if extra.is_file() and extra.suffix in COPIED and "state" not in extra.name:
            shutil.copy2(extra, draft / extra.name)
    draft.replace(target)
    return target


def merged_tensor(name: str, places: Sequence[dict[str, Path]], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of one tensor over the checkpoints."""
    total: Any = None
    last: Any = None
    for found, weight in zip(places, weights):
        with safe_open(found[name], "pt") as file:
            last = file.get_tensor(name)
        if total is not None and total.shape != last.shape:
            raise ValueError(f"{name!r} is {list(last.shape)} in {found[name]}, {list(total.shape)} before.")
        part = last.double() * weight if last.dtype == torch.float64 else last.float() * weight
        total = part if total is None else total + part
    return total.to(last.dtype) if last.is_floating_point() else last


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file of a checkpoint that holds it."""
    if (folder / INDEX).is_file():
        return {name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.")
    with safe_open(folder / WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)
