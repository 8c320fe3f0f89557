"""`hf-moe upcycle`: dense checkpoints into a mixture of experts."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..conversion import Plan

TRAINING_NOTE = "These experts have never worked together: fine-tune the mixture on mixed data before you use it."
EXACT_NOTE = "It computes what its source computes; train it to let the experts differ."


def upcycle(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Dense models: folders with safetensors, or hub ids.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TYPE",
            help="What to become: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3, flex_olmo, bam, mole, rmoe, hf_moe.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the mixture.")],
    method: Annotated[
        str | None,
        typer.Option(help="bam, btx or copy. Default: bam for --to bam, else copy for one source and btx for more."),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Experts per layer: one per source, or the number of copies (default 8).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Feed-forward experts per token. Default: 1 for bam, else 2.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Which layers become sparse: all, every-2, last-half, first-half, or 0,4,8-11.")
    ] = "all",
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize", help="Divide the chosen gates by their sum. Default: the method's."
        ),
    ] = None,
    router_init: Annotated[str, typer.Option(help="random, zero or tied.")] = "random",
    router_std: Annotated[float, typer.Option(help="Standard deviation of random routers.")] = 0.02,
    share_key_value: Annotated[
        bool, typer.Option("--share-key-value", help="bam: one averaged set of keys and values (a smaller cache).")
    ] = False,
    block_type: Annotated[
        str | None, typer.Option(help="Insist that the sources have pre_norm (Llama-like) or parallel blocks.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the sources' own.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random routers.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of the output, like 5GB or 200MB.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in the output folder, or what a killed run left.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
) -> None:
    """Turn dense Llama, Mistral, Qwen2, Qwen3 or dense hf_moe models into a mixture of experts.

    bam and btx take several fine-tunes of one base model, copy takes one.

    The output folder appears when it is complete, with the first tokenizer.

    Examples:

        hf-moe upcycle my-llama --to mixtral --num-experts 8 --output my-mixtral

        hf-moe upcycle code-llama math-llama --to mixtral --output my-btx

        hf-moe upcycle base code math law --to bam --share-key-value --dtype bfloat16 --output my-bam
    """
    from rich.console import Console

    from ..conversion import Options, check_output, convert, plan_upcycling

    check_output(output, overwrite, sources)
    options = Options(
        target=to,
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        normalize=normalize,
        router_init=router_init,
        router_std=router_std,
        method_options={"share_key_value": True} if share_key_value else {},
        block_type=block_type,
        seed=seed,
        dtype=dtype,
    )
    plan = plan_upcycling(sources, options)
    console = Console()
    show_plan(console, plan)
    if dry_run:
        console.print_json(plan.config.to_json_string(), indent=2)
        return
    written = convert(plan, output, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)
    name = f"{plan.target.model_class.__name__} ({plan.main_dtype})"
    size = f"{written.bytes / 1e9:.2f} GB in {written.seconds:.0f} s"
    console.print(f"Saved {name} to {written.folder}: {size}", markup=False, soft_wrap=True)
    exact = plan.guarantee.exactness == "exact"
    console.print(EXACT_NOTE if exact else TRAINING_NOTE, style=None if exact else "yellow", soft_wrap=True)


def show_plan(console: "Console", plan: "Plan") -> None:
    """What is going to be made, before it is made."""
    from rich.table import Table
    from rich.text import Text

    settings = plan.layout
    total, active = plan.num_parameters()
    table = Table(title=f"{len(plan.sources)} dense -> {plan.options.target}", show_header=False)
    rows = {
        "sources": "\n".join(source.label for source in plan.sources),
        "method": f"{settings.method}: {plan.method.summary}",
        "experts": f"{settings.num_experts} per layer, {settings.top_k} per token",
        "sparse layers": f"{len(settings.layers)} of {plan.dense.num_layers}",
        "parameters": f"{total:,}",
        "active per token": f"{active:,} ({active / total:.0%})",
        "tensors": f"{len(plan.recipes):,}, {plan.bytes / 1e9:.2f} GB",
        "before training": f"{plan.guarantee.exactness}: {plan.guarantee.reason}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # a path may look like markup
    console.print(table)
