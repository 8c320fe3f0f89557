"""`hf-moe card`: the model card of a folder, to read before it is published."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

License = Annotated[
    str | None, typer.Option("--license", help="Of the model, e.g. apache-2.0. Default: its sources', if they agree.")
]
BaseModel = Annotated[
    list[str] | None,
    typer.Option("--base-model", help="A hub id it comes from; repeat it. Default: the receipt's."),
]
Dataset = Annotated[list[str] | None, typer.Option("--dataset", help="A hub id of training data; repeat it.")]
EvalDataset = Annotated[
    str | None,
    typer.Option("--eval-dataset", help="What the figures in eval_results.json were measured on: publishes them."),
]
Plot = Annotated[
    bool | None,
    typer.Option(
        "--plot/--no-plot", help="Draw the load of the experts. Default: if receipt and matplotlib are there."
    ),
]


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.")],
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="Where it will be, for the examples.")] = None,
    license: License = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    eval_dataset: EvalDataset = None,
    plot: Plot = None,
    write: Annotated[bool, typer.Option("--write", help="Save it as README.md (and expert_load.png) in DIR.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md of your own.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Have the metadata checked by the hub.")] = False,
) -> None:
    """Print the model card that `hf-moe push` would publish.

    Examples:

        hf-moe card my-mixtral

        hf-moe card my-mixtral --license apache-2.0 --write
    """
    from ..hub.card import CARD, has_own_card
    from ..hub.publishing import explained

    if write and has_own_card(folder) and not overwrite:
        raise ValueError(f"{folder / CARD} is your own text; add --overwrite to replace it.")
    text = make_card(folder, repo_id, license, base_model, dataset, eval_dataset, plot if write else False)
    if validate:
        with explained(repo_id or folder.name):
            text.validate()
        typer.echo("The hub accepts the metadata.", err=True)
    if write:
        text.save(folder / CARD)
        typer.echo(f"Wrote {folder / CARD}.")
    else:
        show(str(text))


def make_card(
    folder: Path,
    repo_id: str | None,
    license: str | None,
    base_model: list[str] | None,
    dataset: list[str] | None,
    eval_dataset: str | None,
    plot: bool | None,
) -> "ModelCard":
    """The card of a folder with what was said on the command line; `plot` draws the picture into the folder."""
    from ..hub import model_card
    from ..hub.plots import plot_expert_load

    if plot is None and find_spec("matplotlib") is None:
        typer.echo("No plot: matplotlib is not installed (pip install 'hf_moe[plot]').", err=True)
    elif plot is not False:
        plot_expert_load(folder)
    return model_card(
        folder,
        repo_id=repo_id,
        license=license,
        base_model=base_model or (),
        datasets=dataset or (),
        eval_dataset=eval_dataset,
    )


def show(text: str) -> None:
    """Rendered on a terminal; as it is when it goes to a file or to another program."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)
