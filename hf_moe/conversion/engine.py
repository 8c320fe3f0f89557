"""Running a plan on disk: one tensor at a time from the sources' shards into those of the result.

The work happens in a hidden sibling of the output, which takes its place when everything is complete. A run that is
killed leaves the sibling; with `resume` its finished shards are kept.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.utils.hub import convert_file_size_to_int

from .output import check_output, copy_companions, flush, replace, sync
from .planning import Plan
from .shards import ShardWriter, num_bytes, sha256_of, shard_names, split_into_shards

PROGRESS, LOCK, INDEX = "progress.json", "lock", "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Written:
    """What a conversion wrote.

    Args:
        folder: where it is.
        bytes: of all tensors.
        seconds: of work.
        shards: file -> SHA-256.
        sources: per source, file -> SHA-256; empty for a model in memory.
    """

    folder: Path
    bytes: int
    seconds: float
    shards: dict[str, str]
    sources: list[dict[str, str]]


def convert(
    plan: Plan,
    output: str | Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
) -> Written:
    """Run a plan, streaming: memory holds the tensors of one recipe, whatever the size of the model.

    Args:
        plan: what to make.
        output: the folder, which appears complete or not at all.
        max_shard_size: of one file, in bytes or like "5GB"; a single larger tensor has a file of its own.
        overwrite: replace a model that is there, and start again where a killed run left something.
        resume: go on where a killed run of the same plan stopped.

    Raises:
        ValueError: bad input, before any work; or a damaged source, or a full disk, by file and tensor.
    """
    started = time.monotonic()
    folders = [source.folder for source in plan.sources if source.folder is not None]
    target = check_output(output, overwrite, folders)
    files = plan_files(plan, max_shard_size)
    identity = identity_of(plan, files)
    check_space(plan, target)
    with workplace(target, identity, overwrite, resume) as partial, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(hash_sources, plan)
        shards = write_shards(plan, partial, files)
        write_small_files(plan, partial, files)
        written = Written(target, plan.bytes, time.monotonic() - started, shards, hashes.result())
        (partial / PROGRESS).unlink()
        flush(partial)
        check_output(output, overwrite, folders)
    return written


def plan_files(plan: Plan, max_shard_size: int | str) -> dict[str, list[str]]:
    """File -> its tensors."""
    try:
        limit = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise ValueError(f"max_shard_size={max_shard_size!r} is no size; say 5GB or 200MB") from error
    if limit < 1:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be positive")
    shards = split_into_shards(plan.shapes, limit)
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def identity_of(plan: Plan, files: dict[str, list[str]]) -> str:
    """A digest of everything that decides the result: recipes, options, sources and the cut into files."""
    sources = [
        sorted((name, facts.shape, str(facts.dtype), facts.file) for name, facts in checkpoint.facts.items())
        for checkpoint in plan.checkpoints
    ]
    stamps = [
        sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.folder.iterdir())
        for checkpoint in plan.checkpoints
        if checkpoint.folder is not None
    ]
    labels = [source.label for source in plan.sources]
    facts = (plan.options, plan.recipes, plan.shapes, labels, sources, stamps, files, plan.config.to_json_string())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def check_space(plan: Plan, target: Path) -> None:
    """Refuse a result that the disk has no room for."""
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < plan.bytes:
        raise ValueError(f"{place} has {free / 1e9:.1f} GB free, the result needs {plan.bytes / 1e9:.1f} GB")


@contextmanager
def workplace(target: Path, identity: str, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The hidden sibling in which this run, and no other at the same time, prepares `target`."""
    partial = target.with_name(f".{target.name}.partial")
    created = [parent for parent in target.parents if not parent.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{target} is being written by another run: wait for it, or choose another output") from error
    try:
        claim(partial, target, identity, overwrite, resume)
        yield partial
        lock.release()
        (partial / LOCK).unlink(missing_ok=True)
        replace(partial, target)
    except BaseException as error:
        finished = bool(read_progress(partial).get("shards"))
        lock.release()
        if not finished and not isinstance(error, Unfinished):
            shutil.rmtree(partial, ignore_errors=True)
            for parent in created:  # innermost first
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "; make room and pass --resume (resume=True)" if finished else ""
            raise ValueError(f"the disk is full: {error}{advice}") from error
        raise


class Unfinished(ValueError):
    """Somebody's earlier work is in the way; it is not touched."""


def claim(partial: Path, target: Path, identity: str, overwrite: bool, resume: bool) -> None:
    """Take over what a killed run left, clear it away, or refuse to do either."""
    progress = read_progress(partial)
    if progress and resume and progress["identity"] != identity:
        raise Unfinished(
            f"{target}: the unfinished run was another one (other sources, options or shard size);"
            " pass --overwrite instead of --resume to start again"
        )
    if progress and not resume and not overwrite and progress["shards"]:
        done = sum((partial / file).stat().st_size for file in progress["shards"])
        raise Unfinished(
            f"{target}: a killed run left {len(progress['shards'])} finished files ({done / 1e9:.1f} GB);"
            " pass --resume to go on, or --overwrite to start again"
        )
    kept = set(progress["shards"]) if progress and resume else set()
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK and path.name not in kept | {PROGRESS}:
            path.unlink()
    if not (progress and resume):
        write_json(partial / PROGRESS, {"identity": identity, "shards": {}})


def read_progress(partial: Path) -> dict[str, Any]:
    """What an earlier run recorded; empty if there was none."""
    path = partial / PROGRESS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file beside its place and rename it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def write_shards(plan: Plan, partial: Path, files: dict[str, list[str]]) -> dict[str, str]:
    """Write what is not written yet; returns file -> SHA-256."""
    progress, kitchen = read_progress(partial), plan.kitchen()
    bar = tqdm(total=plan.bytes, desc="Upcycling", unit="B", unit_scale=True, delay=5)
    for file, names in files.items():
        shapes = {name: plan.shapes[name] for name in names}
        if file in progress["shards"]:
            bar.update(sum(num_bytes(*shape) for shape in shapes.values()))
            continue
        beside = partial / f"{file}.new"
        with ShardWriter(beside, shapes) as shard:
            for name in names:
                tensor = plan.recipes[name].run(kitchen).to(shapes[name][1])
                try:
                    shard.add(name, tensor)
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror}, while writing {name!r} to {file}") from error
                bar.update(tensor.nbytes)
        os.replace(beside, partial / file)
        sync(partial)
        progress["shards"][file] = shard.sha256
        write_json(partial / PROGRESS, progress)
    bar.close()
    return progress["shards"]


def write_small_files(plan: Plan, partial: Path, files: dict[str, list[str]]) -> None:
    """Config, generation config, index, tokenizer and licence files."""
    config = copy.deepcopy(plan.config)
    config.architectures, config.dtype = [plan.target.model_class.__name__], plan.main_dtype
    config.save_pretrained(partial)
    first = plan.sources[0]
    if (generation_config := first.generation_config()) is not None:
        generation_config.save_pretrained(partial)
    if len(files) > 1:
        total, _ = plan.num_parameters()
        weight_map = {name: file for file, names in files.items() for name in names}
        metadata = {"total_parameters": total, "total_size": plan.bytes}
        write_json(partial / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    if first.folder is not None:
        copy_companions(first.folder, partial)


def hash_sources(plan: Plan) -> list[dict[str, str]]:
    """SHA-256 of every weight file of every source."""
    hashes = []
    for checkpoint in plan.checkpoints:
        folder, files = checkpoint.folder, sorted({facts.file for facts in checkpoint.facts.values()})
        hashes.append({file: sha256_of(folder / file) for file in files} if folder is not None else {})
    return hashes
