"""The plan of a conversion: everything checked, every tensor of the result with its recipe, nothing read yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .dense import NORMS, Dense
from .methods import METHODS, Guarantee, Ingredients, Method
from .options import Options, choose, settle_dtype
from .recipes import Kitchen, Recipe
from .sources import Source, open_sources
from .targets import TARGETS, Layout, Target

SourceLike = str | Path | PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checked conversion: target tensor name -> recipe over source tensors. Nothing has been read yet."""

    sources: list[Source]
    options: Options
    method: Method
    layout: Layout
    target: Target
    config: PreTrainedConfig
    recipes: dict[str, Recipe]
    guarantee: Guarantee
    dense: Dense

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the result; None: each tensor keeps its source's."""
        return settle_dtype(self.options.dtype, [])

    def kitchen(self, read: Any, device: str = "cpu") -> Kitchen:
        """What the recipes run in."""
        dtype = self.dtype or settle_dtype(None, [source.dtype for source in self.sources]) or torch.float32
        return Kitchen(read, self.options.seed, dtype, device)

    def num_parameters(self) -> tuple[int, int]:
        """Total and active parameters; active leaves out the experts that a token does not visit."""
        with torch.device("meta"):
            model = self.target.model_class(self.config)
        return count_parameters(model)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Total and active parameters: a token visits `num_experts_per_tok` of `num_experts` feed-forward experts."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    if not routed:
        return total, total
    return total, total - routed + routed * model.config.num_experts_per_tok // model.config.num_experts


def plan_upcycling(given: SourceLike | Sequence[SourceLike], options: Options) -> Plan:
    """Check sources and options from configs and tokenizers alone, and lay out every tensor of the result."""
    choose("target", options.target, TARGETS)
    options.check()
    target, sources = TARGETS[options.target], open_sources(given)
    method = make_method(options, target, len(sources))
    method.check_sources(len(sources))
    dense = method.describe(sources)
    check_block_type(options.block_type, dense)
    if objections := target.objections(dense):
        able = [name for name, other in TARGETS.items() if not other.objections(dense)]
        raise ValueError(
            f"{options.target!r} cannot express these sources: {'; '.join(objections)}. Targets that can: {able}"
        )
    layout = method.layout(options, dense, len(sources), target)
    if objections := target.objections_to_layout(dense, layout):
        raise ValueError(f"{options.target!r} cannot express method={method.name!r} here: {'; '.join(objections)}")
    config = method.config(sources, dense, layout, target, options.config_overrides)
    recipes = method.recipes(Ingredients(dense, sources, layout, target, config, options))
    settle_dtype(options.dtype, [source.dtype for source in sources])
    guarantee = method.guarantee(layout, options, target)
    return Plan(sources, options, method, layout, target, config, recipes, guarantee, dense)


def make_method(options: Options, target: Target, num_sources: int) -> Method:
    """The method that was asked for, or the one that target and sources suggest, with its own options."""
    able = {name: method for name, method in METHODS.items() if method.fits(options.target, target)}
    default = target.default_method or ("copy" if num_sources == 1 else "btx")
    name = options.method or default
    choose("method", name, METHODS)
    if name not in able:
        raise ValueError(f"method={name!r} cannot make a {options.target!r}; choose from {list(able)}")
    for option in options.method_options.keys() - set(METHODS[name].options()):
        users = [repr(other.name) for other in METHODS.values() if option in other.options()]
        raise ValueError(f"{option} only means something to method={' or '.join(users)}, not {name!r}")
    return METHODS[name](**options.method_options)


def check_block_type(block_type: str | None, dense: Dense) -> None:
    """Refuse another layout of the residual stream than the sources'."""
    if block_type not in (None, dense.block_type):
        choose("block_type", block_type, list(NORMS))
        raise ValueError(
            f"block_type={block_type!r}, but the sources have {dense.block_type!r} blocks and keep them:"
            " the other layout would compute something else"
        )
