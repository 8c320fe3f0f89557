"""Upcycling: dense models in, a mixture of experts out. Check everything, plan, then run the plan in memory."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .dense import check_alike
from .methods import EXACT_METHODS, make_recipes
from .options import Options, choose, settle, settle_dtype
from .recipes import Recipe, generator_for, inputs, run
from .sources import Source, open_sources, tensors_of
from .targets import TARGETS, Settings

SourceLike = str | Path | PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checked conversion: target tensor name -> recipe over source tensors. Nothing has been read yet."""

    sources: list[Source]
    settings: Settings
    config: PreTrainedConfig
    recipes: dict[str, Recipe]
    seed: int
    dtype: str | torch.dtype | None  # None: the sources' own

    @property
    def exact(self) -> bool:
        """Whether the mixture computes what its source computes, before any training."""
        return self.settings.method in EXACT_METHODS

    def num_parameters(self) -> tuple[int, int]:
        """Total and active parameters; active leaves out the experts that a token does not visit."""
        with torch.device("meta"):
            model = TARGETS[self.settings.target].model_class(copy.deepcopy(self.config))
        return count_parameters(model)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Total and active parameters: a token visits `num_experts_per_tok` of `num_experts` feed-forward experts."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    if not routed:
        return total, total
    return total, total - routed + routed * model.config.num_experts_per_tok // model.config.num_experts


def upcycle(
    sources: SourceLike | Sequence[SourceLike],
    target: str = "bam",
    *,
    method: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    router_init: str = "random",
    router_std: float = 0.02,
    share_key_value: bool = False,
    block_type: str | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Turn dense models into a mixture of experts.

    Args:
        sources: one or several dense causal language models (Llama, Mistral, Qwen2, Qwen3 or dense `hf_moe`): local
            folders, hub ids or models in memory, which stay untouched.
        target: what to become, a key of `TARGETS`.
        method: a key of `METHODS`. Defaults to `bam` for that target, else `copy` for one source, `btx` for more.
        num_experts: the number of sources for `bam` and `btx`; for `copy` 8 unless given.
        top_k: feed-forward experts per token. Defaults to 1 for `bam` and 2 otherwise, as in the papers.
        router_init: `random`, from N(0, `router_std`), or `zero`.
        share_key_value: `bam` only: one averaged set of keys and values for all attention experts.
        block_type: only to insist on `pre_norm` or `parallel`: sources keep the layout they have.
        seed: fixes the random routers.
        dtype: of the result; by default the sources'.
        config_overrides: further fields of the target's config, such as `router_aux_loss_coef=0.02`.

    Returns:
        The mixture, on the CPU. With `copy` it computes what its source computes; `bam` and `btx` need training.

    Raises:
        ValueError: sources that do not fit together or that the target cannot express, or an unknown option.
    """
    options = Options(
        target=target,
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        router_init=router_init,
        router_std=router_std,
        share_key_value=share_key_value,
        block_type=block_type,
        seed=seed,
        dtype=dtype,
        config_overrides=config_overrides,
    )
    return execute(plan_upcycling(sources, options))


def plan_upcycling(given: SourceLike | Sequence[SourceLike], options: Options) -> Plan:
    """Check sources and options from configs and tokenizers alone, and lay out every tensor of the result."""
    choose("target", options.target, TARGETS)
    sources = open_sources(given)
    settings = settle(options, len(sources))
    dense = check_alike(sources)
    if options.block_type not in (None, dense.block_type):
        choose("block_type", options.block_type, ["pre_norm", "parallel"])
        raise ValueError(
            f"block_type={options.block_type!r}, but the sources have {dense.block_type!r} blocks and keep them:"
            " the other layout would compute something else"
        )
    target = TARGETS[options.target]
    if objections := target.objections(dense):
        able = [name for name, other in TARGETS.items() if not other.objections(dense)]
        raise ValueError(
            f"{options.target!r} cannot express these sources: {'; '.join(objections)}. Targets that can: {able}"
        )
    config = target.config(dense, settings, options.config_overrides)
    recipes = make_recipes(dense, settings, config, len(sources))
    settle_dtype(options.dtype, [source.dtype for source in sources])
    return Plan(sources, settings, config, recipes, options.seed, options.dtype)


def execute(plan: Plan) -> PreTrainedModel:
    """Run a plan in memory."""
    models = [source.load() for source in tqdm(plan.sources, "Loading sources", unit="model", delay=5)]
    tensors = [tensors_of(model) for model in models]
    check_complete(plan, tensors)
    dtype = settle_dtype(plan.dtype, [model.dtype for model in models]) or models[0].dtype

    def read(source: int, name: str) -> torch.Tensor:
        return tensors[source][name].to("cpu")

    state = {}
    for name, recipe in tqdm(plan.recipes.items(), "Upcycling", unit="tensor", delay=5):
        state[name] = run(recipe, read, generator_for(name, plan.seed)).to(dtype).contiguous()
    return assemble(plan, state, dtype, models[0])


def assemble(
    plan: Plan, state: dict[str, torch.Tensor], dtype: torch.dtype, first: PreTrainedModel
) -> PreTrainedModel:
    """Load the finished tensors, all of them and nothing else, into the target."""
    model, report = TARGETS[plan.settings.target].model_class.from_pretrained(
        None, config=plan.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), f"plan and model disagree: {report}"
    model.generation_config = copy.deepcopy(first.generation_config)
    return model


def check_complete(plan: Plan, tensors: list[dict[str, torch.Tensor]]) -> None:
    """Every tensor that the plan reads must exist in memory, and every tensor that exists must be used."""
    wanted: list[set[str]] = [set() for _ in tensors]
    for recipe in plan.recipes.values():
        for tensor in inputs(recipe):
            wanted[tensor.source].add(tensor.name)
    for source, names, found in zip(plan.sources, wanted, tensors, strict=True):
        if names != found.keys():
            lacks, extra = sorted(names - found.keys()), sorted(found.keys() - names)
            raise ValueError(f"{source.label}: unexpected tensors; lacks {lacks[:3]}, has no place for {extra[:3]}")
        if any(tensor.is_meta for tensor in found.values()):
            raise ValueError(f"{source.label}: its weights are offloaded or on the meta device; load it whole")
