"""Upcycling: dense models in, a mixture of experts out. Check everything, plan, then run the plan."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .methods import METHODS
from .options import Options, settle_dtype
from .planning import Plan, SourceLike, plan_upcycling
from .sources import tensors_of


def upcycle(
    sources: SourceLike | Sequence[SourceLike],
    target: str = "bam",
    *,
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
) -> PreTrainedModel:
    """Turn dense models into a mixture of experts.

    Args:
        sources: one or several dense causal language models, of a family in `FAMILIES`: local folders, hub ids or
            models in memory, which stay untouched.
        target: what to become, a key of `TARGETS`.
        method: a key of `METHODS`. Defaults to `bam` for that target, else `copy` for one source, `btx` for more.
        num_experts: routed experts per layer; the number of sources for `bam` and `btx`, else 8 unless given.
        top_k: feed-forward experts per token. Defaults to 1 for `bam` and 2 otherwise, as in the papers.
        granularity: shards into which each dense feed-forward is cut, for methods that cut it.
        shared_experts: experts that every token passes through, for methods and targets that have them.
        layers: which layers become sparse: `all`, `every-2`, `last-half`, `first-half`, "0,4,8-11" or numbers.
        normalize: whether the chosen gates are divided by their sum. Defaults to what keeps the method exact.
        router_init: a key of `ROUTER_INITS`; `random`, from N(0, `router_std`), unless the method says otherwise.
        block_type: only to insist on a layout of the residual stream: sources keep the one they have.
        data: texts for what is calibrated; see `calibration.py`.
        seed: fixes everything random.
        dtype: of the result; by default each tensor keeps its source's.
        more: the method's own options, and further fields of the target's config (`router_aux_loss_coef=0.02`).

    Returns:
        The mixture, on the CPU. `plan_upcycling(...).guarantee` says what it computes before any training.

    Raises:
        ValueError: sources that do not fit together or that the target cannot express, or an unknown option.
    """
    own = {name for each in METHODS.values() for name in each.options()}
    options = Options(
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
        method_options={name: value for name, value in more.items() if name in own},
        config_overrides={name: value for name, value in more.items() if name not in own},
    )
    return execute(plan_upcycling(sources, options))


def execute(plan: Plan) -> PreTrainedModel:
    """Run a plan in memory."""
    models = [source.load() for source in tqdm(plan.sources, "Loading sources", unit="model", delay=5)]
    tensors = [tensors_of(model) for model in models]
    check_complete(plan, tensors)
    dtype = settle_dtype(plan.options.dtype, [model.dtype for model in models]) or models[0].dtype

    def read(source: int, name: str) -> torch.Tensor:
        return tensors[source][name].to("cpu")

    state, kitchen = {}, plan.kitchen(read)
    for name, recipe in tqdm(plan.recipes.items(), "Upcycling", unit="tensor", delay=5):
        state[name] = recipe.run(kitchen).to(dtype).contiguous()
    return assemble(plan, state, dtype, models[0])


def assemble(
    plan: Plan, state: dict[str, torch.Tensor], dtype: torch.dtype, first: PreTrainedModel
) -> PreTrainedModel:
    """Load the finished tensors, all of them and nothing else, into the target."""
    model, report = plan.target.model_class.from_pretrained(
        None, config=plan.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), f"plan and model disagree: {report}"
    model.generation_config = copy.deepcopy(first.generation_config)
    return model


def check_complete(plan: Plan, tensors: list[dict[str, torch.Tensor]]) -> None:
    """Every tensor that the plan reads must exist in memory, and every tensor that exists must be used."""
    wanted: list[set[str]] = [set() for _ in tensors]
    for recipe in plan.recipes.values():
        for tensor in recipe.inputs():
            wanted[tensor.source].add(tensor.name)
    for source, names, found in zip(plan.sources, wanted, tensors, strict=True):
        if names != found.keys():
            lacks, extra = sorted(names - found.keys()), sorted(found.keys() - names)
            raise ValueError(f"{source.label}: unexpected tensors; lacks {lacks[:3]}, has no place for {extra[:3]}")
        if any(tensor.is_meta for tensor in found.values()):
            raise ValueError(f"{source.label}: its weights are offloaded or on the meta device; load it whole")
