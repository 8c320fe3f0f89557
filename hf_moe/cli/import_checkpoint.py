"""`hf-moe import`: a public checkpoint whose published type belongs to another architecture."""

from typing import Annotated

import typer

FAMILY_NAMES = "BlockFFN, LLaMA-MoE-v2 or PLM"


def import_checkpoint(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{FAMILY_NAMES}. Default: as its config.json looks.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a commit, branch or tag.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as it is.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of the output, like 5GB or 200MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would become; write nothing.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Publish the result too, as `hf-moe push` does."),
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see a new repository.")] = None,
) -> None:
    """Rewrite a public checkpoint under a type of ours, for families whose published type others own.

    Everything else loads by `from_pretrained` with hf_moe imported, and needs no import. No code of the repository is
    run, and every one of its tensors is used.

    Examples:

        hf-moe import SparseLLM/BlockFFN-Small --output blockffn-small

        hf-moe import LLaMA-MoE-v2/LLaMA-MoE-v2-3_8B-2_8-sft --output llama-moe-v2 --dry-run
    """
    from ..conversion.importing import import_checkpoint as write
    from ..conversion.importing import plan_import
    from .push import push_result

    plan = plan_import(source, family, revision)
    what = f"{plan.family} as {plan.imported.config.model_type}"
    if dry_run:
        typer.echo(f"{source} becomes {what}")
        return
    if output is None:
        raise ValueError("missing: --output DIR; add it, or --dry-run")
    options = {"family": family, "revision": revision, "dtype": dtype, "overwrite": overwrite}
    folder = write(source, output, max_shard_size=max_shard_size, **options)
    typer.echo(f"Wrote {folder}: {what}")
    push_result(folder, push_to_hub, private)
