"""Running a plan on disk: one tensor at a time from the sources' shards into those of the result.

The work happens in a hidden sibling of the output, which takes its place when everything is complete. A run that is
killed leaves the sibling; with `resume` its finished shards are kept.
"""

import copy
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Event

import torch
from tqdm import tqdm
from transformers.utils.hub import convert_file_size_to_int

from .checkpoints import INDEX
from .output import check_output, copy_companions
from .planning import Plan
from .recipes import Kitchen
from .tensor_files import Shapes, ShardWriter, content, num_bytes, sha256_of, shard_names, split_into_shards
from .workplace import Workplace, workplace, write_json

DEFAULT_SHARD_SIZE = "5GB"
Findings = dict[Hashable, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """What a conversion wrote.

    Args:
        folder: where it is.
        bytes: of all tensors.
        seconds: of work.
        shards: file -> SHA-256.
        sources: per source, file -> SHA-256; empty for a model in memory.
        peak_rss: most memory that this process ever held, in bytes.
    """

    folder: Path
    bytes: int
    seconds: float
    shards: dict[str, str]
    sources: list[dict[str, str]]
    peak_rss: int


def convert(
    plan: Plan,
    output: str | Path,
    *,
    findings: Findings | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
    finish: Callable[[Path, Written], None] | None = None,
) -> Written:
    """Run a plan, streaming: memory holds the tensors of one recipe, whatever the size of the model.

    Args:
        plan: what to make.
        output: the folder, which appears complete or not at all.
        findings: what calibration found out for the plan, from `calibration.find`.
        max_shard_size: of one file, in bytes or like "5GB"; a single larger tensor has a file of its own.
        overwrite: replace a model that is there, and start again where a killed run left something.
        resume: go on where a killed run of the same plan stopped.
        finish: called with the complete folder before it gets its name; what it writes or changes there counts. If it
            fails there is no output, and a run with `resume` goes on here.

    Raises:
        ValueError: bad input, before any work; or a damaged source, or a full disk, by file and tensor.
    """
    started = time.monotonic()
    folders = [source.folder for source in plan.sources if source.folder is not None]
    target = check_output(output, overwrite, folders)
    files = plan_files(plan.shapes, max_shard_size)
    identity = identity_of(plan, files, findings or {})
    with workplace(target, identity, overwrite, resume, folders) as work:
        check_space(plan, work)
        with source_hashes(plan) as hashes:
            write_shards(plan, work, files, findings or {})
            write_small_files(plan, work.folder, files)
            shards = {name: facts["sha256"] for name, facts in work.finished.items()}
            sources = hashes()
        written = Written(target, plan.bytes, time.monotonic() - started, shards, sources, peak_rss())
        if finish is not None:
            finish(work.folder, written)
            changed = [name for name, facts in work.finished.items() if work.facts(name, facts) != facts]
            shards = shards | {name: sha256_of(work.folder / name) for name in changed}
    return replace(written, seconds=time.monotonic() - started, shards=shards, peak_rss=peak_rss())


def plan_files(shapes: Shapes, max_shard_size: int | str) -> dict[str, list[str]]:
    """File -> its tensors."""
    size = int(max_shard_size) if str(max_shard_size).isdigit() else max_shard_size
    try:
        limit = convert_file_size_to_int(size)
    except ValueError as error:
        raise ValueError(f"max_shard_size={max_shard_size!r} is no size; say 5GB or 200MB") from error
    if limit < 1:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be positive")
    shards = split_into_shards(shapes, limit)
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def identity_of(plan: Plan, files: dict[str, list[str]], findings: Findings) -> str:
    """A digest of everything that decides the result: code, recipes, options, sources and the cut into files."""
    digest = hashlib.sha256()
    versions = {name: version(name) for name in ("hf-moe", "torch", "transformers")}
    labels = [source.label for source in plan.sources]
    facts = (versions, plan.options, plan.recipes, plan.shapes, labels, files, plan.config.to_json_string())
    digest.update(repr(facts).encode())
    for checkpoint in plan.checkpoints:
        names = sorted(checkpoint.facts)
        digest.update(repr([(name, checkpoint.facts[name]) for name in names]).encode())
        if checkpoint.folder is None:  # its weights may be other ones in the next process
            for name in sorted(checkpoint.tensors):
                digest.update(content(checkpoint.tensors[name]))
            continue
        for file in checkpoint.files:
            status = (checkpoint.folder / file).stat()
            digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    for key in sorted(findings, key=repr):
        digest.update(repr(key).encode() + content(findings[key]))
    return digest.hexdigest()


def check_space(plan: Plan, work: Workplace) -> None:
    """Refuse a result that the disk has no room for."""
    free = shutil.disk_usage(work.place).free
    needed = plan.bytes - sum(facts["bytes"] for facts in work.finished.values())
    if free < needed:
        raise ValueError(
            f"{work.place.parent} has {free / 1e9:.1f} GB free, the result needs {needed / 1e9:.1f} GB: make room"
        )


def write_shards(plan: Plan, work: Workplace, files: dict[str, list[str]], findings: Findings) -> None:
    """Write the files that are not finished yet. One is flushed to disk while the next one is being written."""
    kitchen, flushed = plan.kitchen(findings), None
    sizes = {file: sum(num_bytes(*plan.shapes[name]) for name in names) for file, names in files.items()}
    done = sum(sizes[file] for file in work.finished)
    bar = tqdm(total=plan.bytes, initial=done, desc="Upcycling", unit="B", unit_scale=True, delay=5)
    with bar, ThreadPoolExecutor(1) as pool:
        for file in [file for file in files if file not in work.finished]:
            shard = write_shard(plan, kitchen, work.folder / f"{file}.new", files[file], bar)
            if flushed is not None:
                flushed.result()
            flushed = pool.submit(finish_shard, work, shard, file)
        if flushed is not None:
            flushed.result()


def write_shard(plan: Plan, kitchen: Kitchen, path: Path, names: list[str], bar: tqdm) -> ShardWriter:
    """Make the tensors of one file and write them, not yet flushed."""
    name = names[0]
    try:
        with ShardWriter(path, {name: plan.shapes[name] for name in names}) as shard:
            for name in names:
                tensor = plan.recipes[name].run(kitchen).to(plan.shapes[name][1])
                shard.add(name, tensor)
                bar.update(tensor.nbytes)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, while writing {name!r} to {path.stem}") from error
    return shard


def finish_shard(work: Workplace, shard: ShardWriter, file: str) -> None:
    """Flush a file, give it its name and record it."""
    shard.close()
    work.finish(shard.path, file, shard.sha256)


def write_small_files(plan: Plan, partial: Path, files: dict[str, list[str]]) -> None:
    """Config, generation config, index, tokenizer and licence files."""
    config = copy.deepcopy(plan.config)
    config.architectures, config.dtype = [plan.target.model_class.__name__], plan.main_dtype
    config.save_pretrained(partial)
    first = plan.sources[0]
    if (generation_config := first.generation_config()) is not None:
        generation_config.save_pretrained(partial)
    write_index(partial, files, plan.shapes)
    if first.folder is not None:
        copy_companions(first.folder, partial)


def write_index(folder: Path, files: dict[str, list[str]], shapes: Shapes) -> None:
    """Which file holds which tensor, where there are several files."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        metadata = {
            "total_parameters": sum(math.prod(shape) for shape, _ in shapes.values()),
            "total_size": sum(num_bytes(*facts) for facts in shapes.values()),
        }
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


@contextmanager
def source_hashes(plan: Plan) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """Hash the sources' files beside other work; the call returns file -> SHA-256 of every source."""
    stop = Event()

    def hash_all() -> list[dict[str, str]]:
        return [
            {file: sha256_of(checkpoint.folder / file, stop) for file in checkpoint.files} if checkpoint.folder else {}
            for checkpoint in plan.checkpoints
        ]

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(hash_all)
        try:
            yield future.result
        finally:
            stop.set()  # an error need not wait for the hashes


def peak_rss() -> int:
    """Most memory that this process ever held, in bytes."""
    if sys.platform == "linux":  # getrusage would also count the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
