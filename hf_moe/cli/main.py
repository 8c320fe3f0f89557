"""The `hf-moe` program: one command per file, errors in one line."""

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from .card import card
from .env import env
from .export import export
from .import_checkpoint import import_checkpoint
from .inspect import inspect
from .push import push
from .quickstart import quickstart
from .run import run
from .show import show
from .upcycle import upcycle
from .verify import verify

app = typer.Typer(
    name="hf-moe",
    help="Mixtures of experts for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Mixtures of experts for Hugging Face Transformers.

    Examples:

        hf-moe quickstart

        hf-moe upcycle law-model code-model --to bam --output mixture

        hf-moe verify mixture law-model code-model

        hf-moe inspect mixture --data code.txt --report routing.html

        hf-moe export mixture --to flat --output standalone

        hf-moe import SparseLLM/BlockFFN-Small --output blockffn-small

        hf-moe card mixture

        hf-moe push mixture me/mixture --private

        hf-moe run -- trl sft --model_name_or_path mixture --dataset_name my-data

        hf-moe show bam

        hf-moe env
    """
    if debug:
        os.environ["HF_MOE_DEBUG"] = "1"


for command in (quickstart, upcycle, verify, export, inspect, card, push, show, env):
    app.command()(command)
app.command("import")(import_checkpoint)  # no function can be called import
app.command(context_settings={"ignore_unknown_options": True})(run)  # they belong to the other program


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """A warning in one line, without the place in the code that says it."""
    print(f"Warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the program. What a user can mend ends in one line and exit code 2."""
    if not os.environ.get("HF_MOE_DEBUG"):
        warnings.showwarning = show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("HF_MOE_DEBUG"):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
