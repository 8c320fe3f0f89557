"""`hf-moe export`: the same model in another form."""

from typing import Annotated

import typer

FORM_NAMES = "native, per-expert, fused or flat"


def export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.")],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=f"{FORM_NAMES}.")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")] = None,
    model_type: Annotated[
        str | None, typer.Option(help="For native: which type. Default: the first that computes the same.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16. Default: as it is.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one file of the output, like 5GB or 200MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would become; write nothing.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Publish the result too, as `hf-moe push` does."),
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see a new repository.")] = None,
) -> None:
    """Write a model as a native type (mixtral, qwen3_moe, glm4_moe, ...), with other tensor names, or with its code.

    native is only done where the native type computes the same, which is measured before the output appears.

    Examples:

        hf-moe export my-ling --to native --output my-glm4-moe

        hf-moe export my-mixtral --to fused --output my-mixtral-fused

        hf-moe export my-bam --to flat --output my-bam-standalone
    """
    from ..conversion.exporting import export as write
    from ..conversion.exporting import plan_export
    from ..conversion.native_equals import native_config
    from .push import push_result

    opened = plan_export(source, to, model_type)
    config = native_config(opened.config, model_type) if to == "native" else opened.config  # pyright: ignore[reportArgumentType]
    if dry_run:
        typer.echo(f"{opened.label} ({opened.config.model_type}) becomes {config.model_type}, {to}")
        return
    if output is None:
        raise ValueError("missing: --output DIR; add it, or --dry-run")
    given = {"model_type": model_type, "dtype": dtype, "max_shard_size": max_shard_size, "overwrite": overwrite}
    folder = write(source, output, to, **given)
    typer.echo(f"Wrote {folder}: {config.model_type}, {to}")
    push_result(folder, push_to_hub, private)
