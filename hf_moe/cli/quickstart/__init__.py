"""`hf-moe quickstart`: the package's main job on real text, from dense models to a saved mixture of experts."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

BLOCK_TYPES = ("pre_norm", "parallel")


def quickstart(
    output_dir: Annotated[Path, typer.Option(help="Where the best mixture goes.")] = Path("hf-moe-quickstart"),
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Your own text: a folder per domain, *.txt inside. Default: Python's standard library."),
    ] = None,
    block_type: Annotated[
        str, typer.Option(help="Blocks of the dense models: pre_norm (Llama) or parallel (the BAM paper).")
    ] = "pre_norm",
    seed: Annotated[int, typer.Option(min=0, help="Weights, order of the text, samples.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A minute instead of ten; the numbers mean nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in --output-dir.")] = False,
) -> None:
    """Train dense models on real text, mix them (soup, BTX, BAM), train the mixtures, compare, save the best.

    Takes at most ten minutes on two CPU cores, downloads nothing, and uses the GPU if there is one.

    Examples:

        hf-moe quickstart

        hf-moe quickstart --fast --output-dir mixture

        hf-moe quickstart --data-dir my_text --block-type parallel --seed 1   # my_text/law/*.txt, my_text/math/*.txt
    """
    if block_type not in BLOCK_TYPES:
        raise ValueError(f"--block-type {block_type!r} is unknown; choose from {list(BLOCK_TYPES)}.")
    if find_spec("matplotlib") is None:
        raise ValueError('results.png needs matplotlib: pip install "hf_moe[plot]".')
    from ...conversion import check_output

    check_output(output_dir, overwrite, sources=[] if data_dir is None else [data_dir])
    from .run import run_quickstart
    from .stages import DEFAULT, FAST

    run_quickstart(output_dir, data_dir, FAST if fast else DEFAULT, seed, block_type, overwrite)
