"""What `hf-moe upcycle` prints: methods, the plan before the work, the result after it."""

import json
import math
import re
from collections import Counter
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..conversion import Plan, Written
    from ..conversion.methods import Method
    from ..conversion.recipes import Recipe

EXACT_NOTE = "It computes what its source computes; train it to let the experts differ."
CLOSE_NOTE = "It is close to its source on the probe; train it to let the experts differ."
TRAINING_NOTE = "Fine-tune the mixture on mixed data before you use it."


def show_methods() -> None:
    """Every method with the number of its sources, its own options and their defaults, and its paper."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from ..conversion import METHODS

    table = Table(
        "method", Column("what", min_width=32), "own options (--set)", show_lines=True
    )  # 32: a paper's address
    for name, method in METHODS.items():
        what = f"{method.summary}\n{method.paper}"
        table.add_row(f"{name}\n{sources_of(method)}", Text(what), Text("\n".join(own_options(method))))
    Console().print(table)


def sources_of(method: "type[Method]") -> str:
    """How many sources a method takes."""
    fewest, most = method.fewest_sources, method.most_sources
    if most is None:
        return f"{fewest} or more sources"
    return count_sources(fewest) if most == fewest else f"{fewest} to {most} sources"


def count_sources(count: int) -> str:
    """So many sources, in words."""
    return f"{count} source" if count == 1 else f"{count} sources"


def own_options(method: "type[Method] | Method") -> list[str]:
    """`name=value` for every option of a method: its default, or what an instance has."""
    found = []
    for each in fields(method):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = default if isinstance(method, type) else getattr(method, each.name)
        found.append(each.name if value is MISSING else f"{each.name}={as_typed(value)}")
    return found


def as_typed(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def show_plan(console: "Console", plan: "Plan", arguments: dict[str, Any]) -> None:
    """What is going to be made, before it is made.

    Args:
        console: where to print.
        plan: what to make.
        arguments: of `upcycle`, as far as they are given.
    """
    from rich.table import Table
    from rich.text import Text

    settings = plan.layout
    total, active = plan.num_parameters()
    options = ", ".join(own_options(plan.method))
    table = Table(title=f"{count_sources(len(plan.sources))} -> {plan.options.target}", show_header=False)
    rows = {
        "sources": "\n".join(source.label for source in plan.sources),
        "method": f"{settings.method}: {plan.method.summary}" + (f" ({options})" if options else ""),
        "experts": describe_experts(plan),
        "sparse layers": f"{len(settings.layers)} of {plan.dense.num_layers}",
        "routers": describe_routers(plan),
        "data": ", ".join(uses_of_data(plan, arguments)) or "not read",
        "parameters": f"{total:,}",
        "active per token": f"{active:,} ({active / total:.0%})",
        "tensors": f"{len(plan.recipes):,}, {plan.bytes / 1e9:.2f} GB in {plan.dtype or 'the types of the sources'}",
        "files": describe_files(plan, arguments),
        "peak memory": "\n".join(describe_memory(plan, arguments)),
        "before training": f"{plan.guarantee.exactness}: {plan.guarantee.reason}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # a path may look like markup
    console.print(table)


def describe_experts(plan: "Plan") -> str:
    """How many experts of which kinds the result has."""
    settings = plan.layout
    found = []
    if settings.layers:
        found.append(f"{settings.num_experts} per layer, {settings.top_k} per token")
        found += [f"{settings.num_shared} shared"] if settings.num_shared else []
        found += [f"{settings.num_null} null among those to choose from"] if settings.num_null else []
    else:
        found.append("none, feed-forwards stay dense")
    if settings.mixer is not None:
        found.append(f"attention: {json.dumps(settings.mixer)}")
    return ", ".join(found)


def describe_routers(plan: "Plan") -> str:
    """How the routers' rows begin."""
    from ..conversion.options import ROUTER_INITS

    init = plan.options.router_init
    if init is None and not any(is_fresh(recipe) for recipe in plan.recipes.values()):
        return "nothing random: zeros, or rows of the sources"
    found = f"{init or 'random'}: {ROUTER_INITS[init or 'random']}"
    found = found.replace("router_std", f"{plan.options.router_std:g}")
    if plan.layout.tied > 1:
        found += f"; equal in sets of {plan.layout.tied} experts"
    return found


def is_fresh(recipe: "Recipe") -> bool:
    """Whether some entries are drawn."""
    from ..conversion.recipes import Normal

    return isinstance(recipe, Normal) or any(is_fresh(part) for part in recipe.parts())


def uses_of_data(plan: "Plan", arguments: dict[str, Any]) -> list[str]:
    """What texts are read for."""
    from ..conversion.options import CALIBRATED_INITS

    uses = {
        f"read to find the routers' rows ({plan.options.router_init})": plan.options.router_init in CALIBRATED_INITS,
        f"read to choose neurons or experts ({plan.method.name})": plan.method.wants_data(),
        f"read to train the routers for {arguments.get('router_steps')} steps": bool(arguments.get("router_steps")),
    }
    return [use for use, is_made in uses.items() if is_made]


def describe_files(plan: "Plan", arguments: dict[str, Any]) -> str:
    """How many files the result has."""
    from ..conversion.engine import DEFAULT_SHARD_SIZE, plan_files

    size = arguments.get("max_shard_size", DEFAULT_SHARD_SIZE)
    return f"{len(plan_files(plan.shapes, size))} of at most {size}"


def describe_memory(plan: "Plan", arguments: dict[str, Any]) -> list[str]:
    """What the stages of a conversion hold at most, one after the other."""
    from ..conversion.options import CALIBRATED_INITS
    from ..conversion.planning import INTERPRETER
    from ..conversion.tensor_files import num_bytes

    found = [f"about {plan.peak_memory / 1e9:.2f} GB to write tensors"]
    if plan.method.wants_data() or plan.options.router_init in CALIBRATED_INITS:
        facts = [checkpoint.facts.values() for checkpoint in plan.checkpoints]
        largest = max(sum(num_bytes(each.shape, each.dtype) for each in source) for source in facts)
        found.append(f"a whole source, {largest / 1e9:.2f} GB, to find out what texts tell")
    if arguments.get("router_steps"):
        found.append(f"the whole result, {plan.bytes / 1e9:.2f} GB, to train its routers")
    if arguments.get("verify", True):
        sizes: Counter[str] = Counter()
        for name, (shape, _) in plan.shapes.items():
            sizes[re.sub(r"^(model\.layers\.\d+\.).*", r"\1", name)] += 4 * math.prod(shape)
        most = INTERPRETER + 2 * max(sizes.values())  # as stored, and as Transformers stacks its experts
        found.append(f"about {most / 1e9:.2f} GB to compare with the sources: two layers in float32")
    return found


def show_result(console: "Console", plan: "Plan", written: "Written") -> None:
    """What was made, how far it is from its sources, and what to do next."""
    from ..conversion import read_receipt

    name = f"{plan.target.model_class.__name__} ({plan.main_dtype})"
    size = f"{written.bytes / 1e9:.2f} GB in {written.seconds:.0f} s"
    console.print(f"Saved {name} to {written.folder}: {size}", markup=False, soft_wrap=True)
    exactness = read_receipt(written.folder)["exactness"]
    measured = exactness["measured"]  # of every source, or nothing
    for source, found in zip(plan.sources if measured else [], measured, strict=True):
        figures = f"largest difference of logits {found['max_logit_difference']:.1e}, KL {found['kl']:.1e} nats"
        console.print(f"Against {source.label}: {figures}", markup=False, soft_wrap=True)
    note, style = advice(exactness)
    console.print(note, style=style, markup=False, soft_wrap=True)


def advice(exactness: dict[str, Any]) -> tuple[str, str | None]:
    """What to do with a result, and the style in which to say it; `exactness` is the receipt's."""
    if exactness["level"] in ("exact", "exact up to rounding"):
        return EXACT_NOTE, None
    if exactness["useful_without_training"]:
        return CLOSE_NOTE, None
    return f"{exactness['level'].capitalize()}: {exactness['reason']}. {TRAINING_NOTE}", "yellow"
