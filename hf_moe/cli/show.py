"""`hf-moe show`: one architecture as a single file to read or to keep."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..modeling import DecoderConfig


def show(
    model_type: Annotated[
        str, typer.Argument(metavar="MODEL_TYPE", help="An architecture, e.g. bam; `hf-moe env` lists them all.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A config.json, or a folder with one: this composition, not the default."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file instead of printing.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
) -> None:
    """Print an architecture as one readable file: the decoder and only the parts that its config names.

    The file runs by itself: importing it registers the architecture with the Auto classes, without hf_moe.

    Examples:

        hf-moe show bam

        hf-moe show rmoe --output modeling_rmoe.py

        hf-moe show hf_moe --config my-model/config.json | less
    """
    from ..hub.flatten import flatten

    if output is None and overwrite:
        raise ValueError("--overwrite has no effect without --output FILE.")
    if output is not None and output.is_dir():
        raise ValueError(f"{output} is a folder; --output needs the name of a file.")
    if output is not None and output.exists() and not overwrite:
        raise ValueError(f"{output} exists already; add --overwrite to replace it.")
    text = flatten(read_config(model_type, config))
    if output is None:
        print_code(text)
    else:
        write_whole(output, text)


def read_config(model_type: str, path: Path | None) -> "DecoderConfig":
    """The config of an architecture: its default, or what a file says."""
    from ..hub.flatten import CLASSES

    if model_type not in CLASSES:
        raise ValueError(f"Unknown model type {model_type!r}; choose from {sorted(CLASSES)}.")
    fields = {} if path is None else read_fields(path)
    found = fields.pop("model_type", model_type)
    if found != model_type:
        raise ValueError(f"{path} is the config of a {found!r} model, not of {model_type!r}.")
    return CLASSES[model_type][0].from_dict(fields)


def read_fields(path: Path) -> dict[str, Any]:
    """What a config.json says."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --config needs a config.json, or a folder that holds one.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object, so it is no config.")
    return fields


def print_code(text: str) -> None:
    """With colours on a terminal; as it is when it goes to a file or to another program."""
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "python", background_color="default"))
    else:
        typer.echo(text, nl=False)


def write_whole(path: Path, text: str, err: bool = False) -> None:
    """Write beside the file, then rename: whoever reads it sees all of it or none. `err`: say so on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    typer.echo(f"Wrote {path} ({len(text.splitlines())} lines).", err=err)
