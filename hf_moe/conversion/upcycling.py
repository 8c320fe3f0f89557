"""Upcycling: dense models in, a mixture of experts out. Check everything, plan, then run the plan."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import find
from .engine import DEFAULT_SHARD_SIZE, convert
from .methods import METHODS
from .options import Options
from .output import check_output
from .planning import Plan, SourceLike, plan_upcycling


def upcycle(
    sources: SourceLike | Sequence[SourceLike],
    target: str = "bam",
    *,
    output: str | Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
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
        return execute(plan, find(plan))
    check_output(output, overwrite, [source.folder for source in plan.sources if source.folder is not None])
    findings = find(plan)
    return convert(plan, output, findings=findings, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)


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
