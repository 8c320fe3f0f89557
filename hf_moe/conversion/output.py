"""Output folders that are complete or absent: written beside their place, flushed, renamed."""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sources import light_folder

COMPANIONS = (  # what comes along from the source: tokenizer and licence files
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model: weights, or a config.json that describes one."""
    if any(folder.glob("*.safetensors")):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or somebody else's file of that name
        return False
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


def check_output(path: str | Path, overwrite: bool = False, sources: Sequence[str | Path] = ()) -> Path:
    """Say whether a model may be written to `path`, before any work begins.

    Args:
        path: the output folder; absent or empty, or one that holds a model if `overwrite` is set.
        overwrite: replace a model that is there.
        sources: what the model is made from; folders among them must survive.

    Returns:
        The absolute path.

    Raises:
        ValueError: the folder must not be replaced.
    """
    output = Path(path).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{path} is a file; the output must be a folder")
    if output.is_mount():  # nothing can be renamed to its name
        raise ValueError(f"{path} is where a disk is mounted; choose a folder inside it")
    if not output.is_dir() or not any(output.iterdir()):
        return output
    if not holds_model(output):
        raise ValueError(
            f"{path} is not empty and holds no model: nothing there is touched, choose another output folder"
        )
    if not overwrite:
        raise ValueError(f"{path} already holds a model; pass --overwrite (overwrite=True) to replace it")
    for kept in (Path.cwd(), Path.home(), *(Path(source).expanduser() for source in sources)):
        if kept.exists() and kept.resolve().is_relative_to(output):
            raise ValueError(f"{path} cannot be replaced: {kept} is that folder or inside it")
    return output


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling of `path` that takes its place when the block ends, and vanishes if the block fails.

    With `overwrite` the old folder stays in its place until the new one is complete.
    """
    output = check_output(path, overwrite)
    created = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{output.name}.*.partial"):
        warnings.warn(
            f"{left} is being written by another run, or was left by a killed one", UserWarning, stacklevel=3
        )
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        flush(partial)
        replace(partial, check_output(path, overwrite))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:  # innermost first; one that somebody else uses by now stays
            with suppress(OSError):
                parent.rmdir()
        raise


def replace(new: Path, output: Path) -> None:
    """Put `new` in the place of `output`; a folder that was there is deleted last."""
    if not output.exists() or not any(output.iterdir()):
        os.rename(new, output)
        sync(output.parent)
        return
    old = new.with_suffix(".replaced")
    os.rename(output, old)
    try:
        os.rename(new, output)
    except BaseException:
        os.rename(old, output)
        raise
    sync(output.parent)
    shutil.rmtree(old)


def flush(folder: Path) -> None:
    """Force a folder's files and names to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """fsync one file or folder."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_upcycled(
    model: PreTrainedModel,
    output: str | Path,
    tokenizer_from: str | Path | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a mixture so that `output` appears complete or not at all.

    Args:
        model: what to save, with its generation config.
        output: the folder.
        tokenizer_from: a tokenizer, or the folder or hub id whose tokenizer and licence files come along unchanged.
        overwrite: replace a model that is there.

    Returns:
        The absolute path of the folder.
    """
    origin = [tokenizer_from] if isinstance(tokenizer_from, str | Path) else []
    check_output(output, overwrite, origin)
    with atomic_directory(output, overwrite) as folder:
        model.save_pretrained(folder)
        if isinstance(tokenizer_from, str | Path):
            copy_companions(light_folder(tokenizer_from), folder)
        elif tokenizer_from is not None:
            tokenizer_from.save_pretrained(folder)
    return Path(output).expanduser().resolve()


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and licence files as they are."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
