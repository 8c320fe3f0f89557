"""`hf-moe upcycle`: dense checkpoints into a mixture of experts."""

from typing import Annotated

import typer

TARGET_NAMES = "mixtral, qwen2_moe, qwen3_moe, olmoe, flex_olmo, deepseek_v3, bam, hf_moe, rmoe or mole"
METHOD_NAMES = (
    "copy, noise, drop, split, shared, virtual_group, granular, null, attention, btx, bam, expand or flex_olmo"
)


def list_methods(wanted: bool) -> None:
    """Print the table of methods and stop."""
    if wanted:
        from .plans import show_methods

        show_methods()
        raise typer.Exit()


def upcycle(
    context: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Dense models (mixtures for expand, flex_olmo): folders with safetensors, or hub ids.",
        ),
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="TYPE", help=f"What to become: {TARGET_NAMES}.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the mixture.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A recipe in YAML with these arguments; what is given here overrides it."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{METHOD_NAMES}. Default: bam for --to bam, else copy for one source and btx for more."),
    ] = None,
    list_them: Annotated[
        bool,
        typer.Option(
            "--list-methods", callback=list_methods, is_eager=True, help="Print the methods and their own options."
        ),
    ] = False,
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
        bool,
        typer.Option(
            "--share-key-value/--no-share-key-value",
            help="bam: one averaged set of keys and values (a smaller cache).",
        ),
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
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An option of the method (--list-methods) or a field of the target's config.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the sources' own.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the random routers.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of the output, like 5GB or 200MB.")] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--no-overwrite", help="Replace a model in the output folder, or what a killed run left."
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on where a killed run stopped.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result with its sources, layer by layer.")
    ] = True,
    router_steps: Annotated[
        int, typer.Option(help="Train the routers alone for so many steps on --data before the output appears.")
    ] = 0,
    router_learning_rate: Annotated[float, typer.Option(help="Of that training.")] = 1e-3,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the receipt, conversion.json, to this file.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Publish the result too, as `hf-moe push` does."),
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see a new repository.")] = None,
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

        hf-moe upcycle --config recipe.yaml --top-k 4 --output my-own
    """
    from rich.console import Console

    from ..conversion import check_output, plan_upcycling, run
    from ..conversion.recipe_files import RUNNING, options_of
    from ..conversion.upcycling import check_warm_up
    from .arguments import as_list, given, settle
    from .plans import show_plan, show_result
    from .push import push_result

    arguments = settle(given(context), config, dry_run)
    output = arguments.get("output")
    if output is not None:
        check_output(output, arguments.get("overwrite", False), as_list(arguments["sources"]))
    options = options_of(arguments)
    check_warm_up(options, arguments.get("router_steps", 0))
    plan = plan_upcycling(arguments["sources"], options)
    console = Console()
    show_plan(console, plan, arguments)
    if dry_run:
        console.print_json(plan.config.to_json_string(), indent=2)
    else:
        written = run(plan, **{name: arguments[name] for name in RUNNING & arguments.keys()})
        show_result(console, plan, written)
        push_result(written.folder, push_to_hub, private)
