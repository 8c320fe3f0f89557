"""Upcycling: dense models in, a mixture of experts out. Check everything, plan, then run the plan."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hub.card import write_card
from .calibration import find
from .engine import DEFAULT_SHARD_SIZE, Written, convert
from .methods import METHODS
from .options import Options
from .output import check_output
from .planning import Plan, SourceLike, plan_upcycling
from .receipt import RECEIPT, certify
from .texts import examples, make_batches


def upcycle(
    sources: SourceLike | Sequence[SourceLike],
    target: str = "bam",
    *,
    output: str | Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    router_steps: int = 0,
    router_learning_rate: float = 1e-3,
    report: str | Path | None = None,
    method: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    granularity: int | None = None,
    shared_experts: int | None = None,
    layers: str | Sequence[int] = "all",
    normalize: bool | None = None,
    router_init: str | None = None,
    router_std: float = 0.02,
    block_type: str | None = None,
    data: Any = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    **more: Any,
) -> Any:
    """Turn dense models into a mixture of experts.

    Args:
        sources: one or several dense causal language models, of a family in `FAMILIES`: local folders, hub ids or
            models in memory, which stay untouched.
        target: what to become, a key of `TARGETS`.
        output: a folder; the mixture is then written there tensor by tensor, and need not fit into memory.
        max_shard_size: of one file of the output.
        overwrite: replace a model that is in the output folder.
        resume: go on where a killed run with the same arguments stopped.
        verify: compare the written result with its sources, layer by layer, and put the figures into the receipt.
        router_steps: with `output` and `data`: train the routers alone for so many steps before the output appears.
        router_learning_rate: of that training.
        report: with `output`: a file to which the receipt, `conversion.json`, is copied.
        method: a key of `METHODS`. Defaults to `bam` for that target, else `copy` for one source, `btx` for more.
        num_experts: routed experts per layer; the number of sources for `bam` and `btx`, else 8 unless given.
        top_k: feed-forward experts per token. Defaults to 1 for `bam` and 2 otherwise, as in the papers.
        granularity: shards into which each dense feed-forward is cut, for methods that cut it.
        shared_experts: experts that every token passes through, for methods and targets that have them.
        layers: which layers become sparse: `all`, `every-2`, `last-half`, `first-half`, "0,4,8-11" or numbers.
        normalize: whether the chosen gates are divided by their sum. Defaults to what keeps the method exact.
        router_init: a key of `ROUTER_INITS`; `random`, from N(0, `router_std`), unless the method says otherwise.
        block_type: only to insist on a layout of the residual stream: sources keep the one they have.
        data: texts for what is calibrated; see `texts.read_data`.
        seed: fixes everything random.
        dtype: of the result; by default each tensor keeps its source's.
        more: the method's own options, and further fields of the target's config (`router_aux_loss_coef=0.02`).

    Returns:
        The mixture, on the CPU; with `output`, a `Written`: folder, size, and hashes of its files and the sources'.
        `plan_upcycling(...).guarantee` says what it computes before any training.

    Raises:
        ValueError: sources that do not fit together or that the target cannot express, or an unknown option.
    """
    options = make_options(
        target=target,
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
        data=data,
        seed=seed,
        dtype=dtype,
        more=more,
    )
    plan = plan_upcycling(sources, options)
    if output is None:
        if report is not None:
            raise ValueError(f"report={str(report)!r} needs an output: only results on disk have a receipt")
        return execute(plan, find(plan))
    return run(
        plan,
        output,
        verify=verify,
        router_steps=router_steps,
        router_learning_rate=router_learning_rate,
        report=report,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
    )


def run(
    plan: Plan,
    output: str | Path,
    *,
    verify: bool = True,
    router_steps: int = 0,
    router_learning_rate: float = 1e-3,
    report: str | Path | None = None,
    **place: Any,
) -> Written:
    """Run a plan on disk: calibrate, convert, warm the routers up, write the receipt.

    Args:
        plan: what to make.
        output: the folder.
        verify: measure how far the result is from its sources.
        router_steps, router_learning_rate: of the routers' warm-up.
        report: a file to which the receipt is copied.
        place: `max_shard_size`, `overwrite`, `resume`, as in `convert`.
    """
    check_warm_up(plan.options, router_steps)
    check_output(output, place.get("overwrite", False), [s.folder for s in plan.sources if s.folder is not None])
    if report is not None and (Path(report).is_dir() or not Path(report).absolute().parent.is_dir()):
        raise ValueError(f"report={str(report)!r} must name a file in a folder that exists")
    findings = find(plan)
    training = {"router_steps": router_steps, "router_learning_rate": router_learning_rate} if router_steps else {}

    def finish(folder: Path, written: Written) -> None:
        if router_steps:
            from ..training import warm_up_folder  # brings Trainer, which nobody else here needs

            rows = examples(make_batches(plan.sources[0], plan.options.data))
            settings = {"learning_rate": router_learning_rate, "seed": plan.options.seed}
            trained = warm_up_folder(folder, rows, router_steps, **settings)
            written.shards.update(trained["shards"])
        certify(plan, folder, written, verify, **training)
        write_card(folder, name=Path(output).expanduser().resolve().name)

    written = convert(plan, output, findings=findings, finish=finish, **place)
    if report is not None:
        copyfile(written.folder / RECEIPT, report)
    return written


def check_warm_up(options: Options, router_steps: int) -> None:
    """Refuse a warm-up of routers that cannot be done."""
    if router_steps < 0 or (router_steps and options.data is None):
        raise ValueError(f"router_steps={router_steps} must not be negative, and needs data to train on")


def make_options(*, more: dict[str, Any], **common: Any) -> Options:
    """The options of a conversion; `more` holds options of some method, and further fields of the target's config."""
    own = {name for method in METHODS.values() for name in method.options()}
    return Options(
        **common,
        method_options={name: value for name, value in more.items() if name in own},
        config_overrides={name: value for name, value in more.items() if name not in own},
    )


def execute(plan: Plan, findings: dict[Hashable, torch.Tensor] | None = None) -> PreTrainedModel:
    """Run a plan in memory; `findings` are those of `calibration.find`."""
    kitchen, shapes = plan.kitchen(findings), plan.shapes
    state = {
        name: recipe.run(kitchen).to(shapes[name][1]).clone()
        for name, recipe in tqdm(plan.recipes.items(), "Upcycling", unit="tensor", delay=5)
    }
    model, report = plan.target.model_class.from_pretrained(
        None, config=plan.config, state_dict=state, dtype=plan.main_dtype, output_loading_info=True
    )
    assert not any(report.values()), f"plan and model disagree: {report}"
    if (generation_config := plan.sources[0].generation_config()) is not None:
        model.generation_config = generation_config
    return model
