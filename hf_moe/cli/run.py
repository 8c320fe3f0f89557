"""`hf-moe run -- PROGRAM`: another program, with our architectures registered in it and in what it starts."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

STARTUP = Path(__file__).parent / "startup"  # a folder with a sitecustomize.py, which every Python reads at its start


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- PROGRAM [ARGUMENT]...", help="What to run.")],
) -> None:
    """Run a program that knows Transformers but not hf_moe: our model types work in it, and in its child processes.

    As soon as a Python process imports transformers, it imports hf_moe too. The exit code is the program's.

    Examples:

        hf-moe run -- trl sft --model_name_or_path my-bam --dataset_name my-data

        hf-moe run -- accelerate launch train.py

        hf-moe run -- lm_eval --model hf --model_args pretrained=my-bam --tasks wikitext
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]!r} is no program that can be found here.")
    raise typer.Exit(subprocess.run(command, env=environment(), check=False).returncode)


def environment() -> dict[str, str]:
    """This process's environment, with our `sitecustomize.py` first."""
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
