"""Where a conversion prepares its output: a hidden sibling `.NAME.partial`, for one run at a time, safe from kills.

.NAME.partial/lock            held while a run is alive
.NAME.partial/progress.json   what the run makes, and which files are finished
.NAME.partial/model/          becomes NAME, by one rename
.NAME.partial/model.replaced  the model that was there, until the new one has its place
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .output import check_output, flush, replace, sync

LOCK = "lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Workplace:
    """The files of a result that are finished, on record.

    Args:
        place: the hidden sibling.
        identity: digest of everything that decides the result.
    """

    def __init__(self, place: Path, identity: str) -> None:
        self.place, self.identity = place, identity
        self.folder, self.record = place / "model", place / "progress.json"
        self.finished: dict[str, dict[str, Any]] = {}

    def load(self) -> dict[str, Any] | None:
        """What an earlier run recorded, of files that are still as it left them; None if there is nothing."""
        if not self.record.is_file() or not self.folder.is_dir():
            return None
        progress = json.loads(self.record.read_text(encoding="utf-8"))
        files = progress["files"]
        progress["files"] = {name: facts for name, facts in files.items() if facts == self.facts(name, facts)}
        return progress

    def facts(self, name: str, known: dict[str, Any]) -> dict[str, Any] | None:
        """What is on record about a file, with its size and time as they are now."""
        path = self.folder / name
        if not path.is_file():
            return None
        status = path.stat()
        return known | {"bytes": status.st_size, "modified": status.st_mtime_ns}

    def finish(self, beside: Path, name: str, sha256: str) -> None:
        """Give a file, already flushed to disk, its name, and record it."""
        os.replace(beside, self.folder / name)
        sync(self.folder)
        facts = self.facts(name, {"sha256": sha256})
        assert facts is not None
        self.finished[name] = facts
        self.save()

    def save(self) -> None:
        """Write the record."""
        write_json(self.record, {"identity": self.identity, "files": self.finished})


@contextmanager
def workplace(
    target: Path, identity: str, overwrite: bool, resume: bool, sources: Sequence[Path] = ()
) -> Iterator[Workplace]:
    """A place to prepare `target`, which gets it if the block ends well.

    If the block fails, finished files stay for a run with `resume`; without any, nothing stays.

    Args:
        target: the output folder.
        identity: digest of everything that decides the result.
        overwrite: replace a model that is there, and forget what a killed run left.
        resume: keep what a killed run of the same identity left.
        sources: folders that must survive.

    Raises:
        ValueError: another run is at work, an earlier one is in the way, or the disk is full.
    """
    created = [parent for parent in target.parents if not parent.exists()]
    work = Workplace(target.with_name(f".{target.name}.partial"), identity)
    work.place.mkdir(parents=True, exist_ok=True)
    with only_run(work.place / LOCK, target):
        ours = not any(path.name != LOCK for path in work.place.iterdir())
        try:
            mend(work, target)
            check_output(target, overwrite, sources)
            claim(work, target, overwrite, resume)
            ours = True
            yield work
            flush(work.folder)
            check_output(target, overwrite, sources)
            replace(work.folder, target)
            shutil.rmtree(work.place)
        except BaseException as error:
            if ours and not work.finished:
                shutil.rmtree(work.place, ignore_errors=True)
                for parent in created:  # innermost first
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
            if isinstance(error, OSError) and error.errno in FULL:
                advice = "; make room and pass --resume (resume=True)" if work.finished else ""
                raise ValueError(f"the disk is full: {error}{advice}") from error
            raise


@contextmanager
def only_run(lock_file: Path, target: Path) -> Iterator[None]:
    """Let no second run in; the system frees the lock of a process that dies."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError) as error:  # the latter: the other run has just finished
        raise ValueError(f"{target} is being written by another run: wait for it, or choose another output") from error
    try:
        yield
    finally:
        lock.release()


def mend(work: Workplace, target: Path) -> None:
    """Settle what a run that was killed between two renames left."""
    old = work.folder.with_suffix(".replaced")
    if not old.exists():
        return
    if not work.folder.exists():  # the new model has its place
        shutil.rmtree(old)
    elif not target.exists():
        os.rename(old, target)
    else:
        raise ValueError(f"a killed run has moved the model that was in {target} to {old}: move one of them away")


def claim(work: Workplace, target: Path, overwrite: bool, resume: bool) -> None:
    """Take over what a killed run left, clear it away, or refuse to do either."""
    progress = work.load()
    if progress and resume and progress["identity"] != work.identity:
        raise ValueError(
            f"{target}: the unfinished run was another one (other sources, options or shard size);"
            " pass --overwrite instead of --resume to start again"
        )
    if progress and progress["files"] and not (resume or overwrite):
        done = sum(facts["bytes"] for facts in progress["files"].values())
        raise ValueError(
            f"{target}: a killed run left {len(progress['files'])} finished files ({done / 1e9:.1f} GB);"
            " pass --resume to go on, or --overwrite to start again"
        )
    work.finished = progress["files"] if progress and resume else {}
    work.folder.mkdir(exist_ok=True)
    for path in work.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in work.finished:
            path.unlink()
    work.save()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file beside its place and rename it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
