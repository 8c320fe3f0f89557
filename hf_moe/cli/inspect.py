"""`hf-moe inspect`: what a model is made of, and how its routers use the experts."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id, of any model of Transformers.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Texts to run, one domain each: .txt (a blank line between documents) or .jsonl (`text`).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write everything, with plots, as one web page.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16: of weights and cache. Default: the config's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where --data runs, e.g. cuda:1. Default: the accelerator, else the CPU.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read of each file of --data.")] = 16384,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report if it exists.")] = False,
) -> None:
    """Show layers, parameters and cache of a model; with --data also what its routers do with each expert.

    Without --data the weights are neither read nor fetched. docs/inspect.md says what every figure means.

    Examples:

        hf-moe inspect my-mixtral

        hf-moe inspect my-mixtral --data code=code.jsonl --data law.txt --report routing.html

        hf-moe inspect allenai/OLMoE-1B-7B-0924 --json > olmoe.json
    """
    import json
    from dataclasses import asdict

    from ..analysis import Inspection, html_report, model_facts
    from ..conversion.options import DTYPES, choose
    from .inspect_model import disk_bytes, domain_files, measure, open_model
    from .inspect_tables import show_inspection
    from .show import write_whole

    check_report(report, overwrite)
    files = domain_files(data or [])
    if dtype is not None:
        choose("dtype", dtype, DTYPES)
    if not files and (device is not None or max_tokens != 16384):
        raise ValueError("--device and --max-tokens have no effect without --data FILE.")
    opened = open_model(model)
    facts = model_facts(opened.config, DTYPES[dtype] if dtype else None)
    routing = measure(opened, facts, files, device, max_tokens) if files else None
    found = Inspection(model, facts, disk_bytes(opened), routing)
    if as_json:
        typer.echo(json.dumps(asdict(found), allow_nan=False))
    else:
        show_inspection(found)
    if report is not None:
        write_whole(report, html_report(found), err=as_json)


def check_report(report: Path | None, overwrite: bool) -> None:
    """Refuse a report that cannot be written, before any work is done."""
    if report is None:
        if overwrite:
            raise ValueError("--overwrite has no effect without --report FILE.html.")
        return
    if report.suffix not in (".html", ".htm"):
        raise ValueError(f"{report} must end in .html; --report writes a web page.")
    if report.is_dir():
        raise ValueError(f"{report} is a folder; --report needs the name of a file.")
    if report.exists() and not overwrite:
        raise ValueError(f"{report} exists already; add --overwrite to replace it.")
