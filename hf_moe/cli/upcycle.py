"""`hf-moe upcycle`: dense checkpoints into a mixture of experts."""

from shutil import copyfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..conversion import Plan

TARGET_NAMES = "mixtral, qwen2_moe, qwen3_moe, olmoe, flex_olmo, deepseek_v3, bam, hf_moe, rmoe or mole"
METHOD_NAMES = "copy, noise, drop, split, virtual_group, granular, btx or bam"
TRAINING_NOTE = "These experts have never worked together: fine-tune the mixture on mixed data before you use it."
EXACT_NOTE = "It computes what its source computes; train it to let the experts differ."


def upcycle(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Dense models: folders with safetensors, or hub ids.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="TYPE", help=f"What to become: {TARGET_NAMES}.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the mixture.")],
    method: Annotated[
        str | None,
        typer.Option(help=f"{METHOD_NAMES}. Default: bam for --to bam, else copy for one source and btx for more."),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Experts per layer: one per source, or the number of copies (default 8).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Feed-forward experts per token. Default: 1 for bam, else 2.")
    ] = None,
    granularity: Annotated[
        int | None, typer.Option(help="Shards into which a dense feed-forward is cut (virtual_group, granular).")
    ] = None,
    shared_experts: Annotated[
        int | None, typer.Option(help="Experts that every token passes through, where method and target have them.")
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
    router_init: Annotated[
        str | None, typer.Option(help="random, zero, tied, or from --data: hidden, kmeans, domain.")
    ] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of random routers.")] = 0.02,
    share_key_value: Annotated[
        bool, typer.Option("--share-key-value", help="bam: one averaged set of keys and values (a smaller cache).")
    ] = False,
    block_type: Annotated[
        str | None, typer.Option(help="Insist that the sources have pre_norm (Llama-like) or parallel blocks.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Texts for what is calibrated, .txt or .jsonl; repeat it for one group per expert."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method or a field of the target's config."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the sources' own.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random routers.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of the output, like 5GB or 200MB.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in the output folder, or what a killed run left.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the result with its sources (both are loaded whole).")
    ] = False,
    router_steps: Annotated[
        int, typer.Option(help="Train the routers alone for so many steps on --data before the output appears.")
    ] = 0,
    router_learning_rate: Annotated[float, typer.Option(help="Of that training.")] = 1e-3,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the receipt, conversion.json, to this file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
) -> None:
    """Turn dense models (Llama, Mistral, Qwen2, Qwen3, OLMo2, SmolLM3, Phi-3, Gemma, ...) into a mixture of experts.

    bam and btx take several fine-tunes of one base model, copy takes one.

    The output folder appears when it is complete, with the first tokenizer.

    Examples:

        hf-moe upcycle my-llama --to mixtral --num-experts 8 --output my-mixtral

        hf-moe upcycle my-llama --to mixtral --method drop --set drop_ratio=0.5 --output my-drop

        hf-moe upcycle my-llama --to mixtral --method virtual_group --granularity 4 --top-k 4 --output my-fine

        hf-moe upcycle code-llama math-llama --to mixtral --output my-btx

        hf-moe upcycle base code math law --to bam --share-key-value --dtype bfloat16 --output my-bam
    """
    from rich.console import Console

    from ..conversion import check_output, make_options, plan_upcycling, read_receipt, run

    check_output(output, overwrite, sources)
    more = read_assignments(assignments or [])
    if share_key_value:
        more["share_key_value"] = True
    options = make_options(
        target=to,
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        granularity=granularity,
        shared_experts=shared_experts,
        layers=layers,
        normalize=normalize,
        router_init=router_init,
        router_std=router_std,
        block_type=block_type,
        data=data[0] if data and len(data) == 1 else data,
        seed=seed,
        dtype=dtype,
        more=more,
    )
    plan = plan_upcycling(sources, options)
    console = Console()
    show_plan(console, plan)
    if dry_run:
        console.print_json(plan.config.to_json_string(), indent=2)
        return
    place = {"max_shard_size": max_shard_size, "overwrite": overwrite, "resume": resume}
    written = run(plan, output, not no_verify, (router_steps, router_learning_rate), **place)
    name = f"{plan.target.model_class.__name__} ({plan.main_dtype})"
    size = f"{written.bytes / 1e9:.2f} GB in {written.seconds:.0f} s"
    console.print(f"Saved {name} to {written.folder}: {size}", markup=False, soft_wrap=True)
    exactness = read_receipt(written.folder)["exactness"]
    for source, found in zip(plan.sources, exactness["measured"], strict=True):
        if found:
            figures = f"largest difference of logits {found['max_logit_difference']:.1e}, KL {found['kl']:.1e} nats"
            console.print(f"Against {source.label}: {figures}", markup=False, soft_wrap=True)
    if report is not None:
        copyfile(written.folder / "conversion.json", report)
    exact = exactness["level"] == "exact"
    console.print(EXACT_NOTE if exact else TRAINING_NOTE, style=None if exact else "yellow", soft_wrap=True)


def read_assignments(assignments: list[str]) -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, so 0.5, true and [1, 2] mean what they look like."""
    import yaml

    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {assignment!r} must be NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment!r}: the value cannot be read") from error
    return found


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
