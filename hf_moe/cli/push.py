"""`hf-moe push`: a model folder to the hub, with its card."""

from pathlib import Path
from typing import Annotated

import typer

from .card import BaseModel, Dataset, EvalDataset, License, Plot, make_card


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder with safetensors.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who may see a new repository. Default: the owner's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the files as a pull request.")] = False,
    commit_message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload model",
    license: License = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    eval_dataset: EvalDataset = None,
    plot: Plot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be uploaded; send nothing.")] = False,
) -> None:
    """Upload a model folder in one commit: safetensors, config, tokenizer and card. Pickle files are refused.

    A README.md of your own is kept. The token is the one of `hf auth login` or HF_TOKEN. What a dropped connection
    left out is sent by the same command again.

    Examples:

        hf-moe push my-mixtral me/my-mixtral --private

        hf-moe push my-mixtral me/my-mixtral --license apache-2.0 --dry-run
    """
    from ..hub import publish
    from ..hub.card import has_own_card
    from ..hub.files import model_files
    from ..hub.publishing import check_license

    model_files(folder)  # says what is wrong with the folder before anything is drawn or written into it
    given = {"--license": license, "--base-model": base_model, "--dataset": dataset, "--eval-dataset": eval_dataset}
    if has_own_card(folder):
        if unused := [flag for flag, value in given.items() if value]:
            raise ValueError(f"{folder / 'README.md'} is your own card: {' and '.join(unused)} would have no effect.")
        text = None
    else:
        text = make_card(folder, repo_id, license, base_model, dataset, eval_dataset, False if dry_run else plot)
    if dry_run:
        if text is not None:
            check_license(folder, text)
        list_files(folder)
        return
    done = publish(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        card=text,
    )
    for name, reason in done.left_out.items():
        typer.echo(f"Not uploaded: {name} ({reason})", err=True)
    typer.echo(f"Published {done.pull_request or done.url} ({done.commit})")


def push_result(folder: Path, repo_id: str | None, private: bool | None) -> None:
    """Publish what another command made, if that was asked for (`--push-to-hub REPO`)."""
    if repo_id is not None:
        push(folder, repo_id, private=private)
    elif private is not None:
        typer.echo("--private has no effect without --push-to-hub REPO", err=True)


def list_files(folder: Path) -> None:
    """What a push would send, and what it would not."""
    from ..hub.files import model_files

    files = model_files(folder)
    for name in files.publish:
        typer.echo(f"{(folder / name).stat().st_size:>14,}  {name}")
    for name, reason in files.left_out.items():
        typer.echo(f"Not uploaded: {name} ({reason})", err=True)
