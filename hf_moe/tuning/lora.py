"""One function that says what LoRA shall train in a mixture, checks it, and shows it."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from ..modeling import DecoderConfig, moe_layers
from .expert_lora import ExpertLoraConfig
from .expert_subset import FIRST, check_experts, expert_modules

DENSE = {"mlp", "feed_forward", "ffn", "block_sparse_moe"}  # modules that hold dense feed-forwards
Experts = str | Sequence[int] | Mapping[int, Sequence[int]]


def lora_config(
    model: Any,
    experts: Experts = "all",
    router: bool = False,
    attention: bool = True,
    rank: int = 8,
    rank_per_layer: Mapping[int, int] | None = None,
    shared_experts: bool = True,
    verbose: bool = True,
    **options: Any,
) -> LoraConfig:
    """A LoRA config for a mixture of experts that trains what it says, for `get_peft_model`, Trainer and TRL.

    PEFT's `target_modules="all-linear"` never reaches stacked experts and says nothing about it; here the coverage is
    printed, and an option that would train nothing is refused.

    Args:
        model: ours or native, of a type that `hf_moe.moe_layers` knows.
        experts: `all`, `none`, ids that are adapted in every MoE layer, or number of a layer -> its ids. With `all`,
            no dropout and one rank PEFT adapts whole stacks, and the config is a plain `LoraConfig` unless dense or
            shared feed-forwards are adapted too, which PEFT would skip; otherwise it is an `ExpertLoraConfig` whose
            cost grows with the number of adapted experts.
        router: whether the routers learn as well: by LoRA, or, in our models, whole (`modules_to_save`), for PEFT's
            wrappers hide from the layer what our routers tell it.
        attention: whether the linear layers of attention and other mixers are.
        rank: r of every matrix.
        rank_per_layer: number of a layer -> its rank, for all its modules, in place of `rank`.
        shared_experts: whether shared experts and the feed-forwards of dense layers are adapted, if experts are.
        verbose: whether the table of what is adapted is printed.
        options: of `peft.LoraConfig`: `lora_alpha` (default twice the rank), `lora_dropout`, `use_rslora`, ...

    Raises:
        ValueError: unknown experts or layers, ranks below 1, options that train nothing, experts that are quantised or
            not stacked.
    """
    if not list(moe_layers(model)):
        raise ValueError(f"{type(model).__name__} has no MoE layers: use peft.LoraConfig.")
    chosen = choose_experts(model, experts)
    ranks = check_ranks(model, rank, rank_per_layer)
    found = linear_layers(model)
    targets = (found["mixer"] if attention else []) + (found["feed_forward"] if shared_experts and chosen else [])
    parameters: list[str] = []
    if router:
        learn_whole = add_routers(model, found["router"], targets, parameters)
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *learn_whole] or None
    if not targets and not chosen and not router:
        raise ValueError("These options adapt nothing: choose experts, router=True or attention=True.")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", **options}
    if parameters and settings.get("lora_dropout"):
        raise ValueError("router=True and lora_dropout exclude each other: PEFT adapts routers without dropout.")
    whole = experts in ("all", "none") and not settings.get("lora_dropout") and not ranks
    if whole:
        parameters += [f"{name}.{stack}" for name in chosen for stack in stacks_of(model.get_submodule(name))]
    names = targets if whole else [*targets, *chosen]
    settings |= patterns(names, ranks, settings)
    settings |= {"target_modules": names, "target_parameters": parameters or None}
    # PEFT takes the linear layers of dense and shared feed-forwards for those of experts, and drops them
    stock = whole and not set(targets) & set(found["feed_forward"])
    config = LoraConfig(**settings) if stock else ExpertLoraConfig(experts={} if whole else chosen, **settings)
    if verbose:
        show(coverage(model, [*targets, *parameters, *(config.modules_to_save or ())], chosen), config)
    return config


def linear_layers(model: Any) -> dict[str, list[str]]:
    """Names of the linear layers but the output head: of `router`, `feed_forward` and `mixer`."""
    names = {module: name for name, module in model.named_modules()}
    sparse = [layer.name for layer in moe_layers(model) if not layer.whole_layer]
    sparse += [names[layer.gate] for layer in moe_layers(model) if layer.whole_layer]
    routers = list(router_names(model))
    head = model.get_output_embeddings()
    found: dict[str, list[str]] = {"router": [], "feed_forward": [], "mixer": []}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if inside(name, routers):
            found["router"].append(name)
        elif inside(name, sparse) or DENSE & set(name.split(".")):
            found["feed_forward"].append(name)
        else:
            found["mixer"].append(name)
    return found


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of some modules, or within one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def router_names(model: Any) -> dict[str, nn.Module]:
    """Name -> router, of all MoE layers that have one with weights."""
    gates = {gate for layer in moe_layers(model) for gate in (layer.gate, *layer.later_gates)}
    return {name: m for name, m in model.named_modules() if m in gates and any(True for _ in m.parameters())}


def add_routers(model: Any, linear: Sequence[str], targets: list[str], parameters: list[str]) -> list[str]:
    """Add what adapts the routers to `targets` and `parameters`; returns the routers that learn whole."""
    routers = list(router_names(model))
    if not routers:
        raise ValueError("router=True, but the routers of this model have no weights.")
    if isinstance(model.config, DecoderConfig):
        return routers
    targets += linear
    parameters += [f"{name}.weight" for name in routers if not any(inside(layer, [name]) for layer in linear)]
    return []


def stacks_of(experts: Any) -> tuple[str, str]:
    """Names of the stacked weights of experts."""
    return FIRST[experts.has_gate], "down_proj"


def patterns(names: Sequence[str], ranks: Mapping[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's patterns for the modules whose rank is not that of all; alpha / r stays."""
    own = {name: ranks[number] for name in names if (number := layer_of(name)) is not None and number in ranks}
    scale = settings["lora_alpha"] / settings["r"]
    return {"rank_pattern": own, "alpha_pattern": {name: scale * rank for name, rank in own.items()}}


def choose_experts(model: Any, experts: Experts) -> dict[str, list[int] | None]:
    """Experts module -> the experts to adapt, None for all."""
    if isinstance(experts, str) and experts not in ("all", "none"):
        raise ValueError(f"experts={experts!r} is unknown; give 'all', 'none', ids, or {{layer: ids}}.")
    if isinstance(experts, str) and experts == "none":
        return {}
    modules = expert_modules(model)
    for name, module in modules.items():
        check_experts(module, name)
    if isinstance(experts, str):
        return dict.fromkeys(modules)
    if isinstance(experts, Mapping):
        known = {number: name for name in modules if (number := layer_of(name)) is not None}
        if unknown := sorted(set(experts) - known.keys()):
            raise ValueError(
                f"experts names layer {unknown[0]}, which has no experts; MoE layers are {sorted(known)}."
            )
        wanted = {known[number]: list(ids) for number, ids in experts.items() if ids}
    else:
        wanted = {name: list(experts) for name in modules}
    for name, ids in wanted.items():
        number: Any = modules[name].num_experts
        if not ids or not all(isinstance(expert, int) and 0 <= expert < number for expert in ids):
            raise ValueError(f"experts={ids} of {name!r} must be some of 0 to {number - 1}.")
    return {name: sorted(set(ids)) for name, ids in wanted.items()}


def check_ranks(model: Any, rank: int, per_layer: Mapping[int, int] | None) -> dict[int, int]:
    """The ranks of single layers, checked."""
    ranks = dict(per_layer or {})
    if bad := [value for value in (rank, *ranks.values()) if value < 1]:
        raise ValueError(f"rank={bad[0]} must be at least 1.")
    numbers = {layer_of(name) for name, _ in model.named_modules()} - {None}
    if unknown := [number for number in ranks if number not in numbers]:
        raise ValueError(f"rank_per_layer names layer {unknown[0]}; the model has 0 to {len(numbers) - 1}.")
    return ranks


def layer_of(name: str) -> int | None:
    """The number of the layer that a module is in."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def coverage(model: Any, learning: Sequence[str], chosen: Mapping[str, Sequence[int] | None]) -> list[tuple[str, ...]]:
    """Rows of the table: module, what it is, what of it learns."""
    rows: list[tuple[str, ...]] = []
    for name, module in expert_modules(model).items():
        base: Any = module
        ids = chosen.get(name, [])
        adapted = list(range(base.num_experts)) if ids is None else list(ids)
        rows.append((name, f"{len(adapted)} of {base.num_experts} experts", shorten(adapted)))
    for name in router_names(model):
        learns = any(inside(module, [name]) for module in learning)
        rows.append((name, "router", "adapted" if learns else "frozen"))
    for kind, names in linear_layers(model).items():
        adapted = [name for name in names if name in learning]
        kinds = shorten(sorted({name.split(".")[-1] for name in adapted}))
        rows.append((f"linear layers: {kind}", f"{len(adapted)} of {len(names)}", kinds))
    return rows


def shorten(values: Sequence[Any], most: int = 8) -> str:
    """The first few of some values."""
    shown = ", ".join(map(str, values[:most]))
    return shown + (f", ... ({len(values)})" if len(values) > most else "")


def show(rows: Sequence[tuple[str, ...]], config: LoraConfig) -> None:
    """Print the coverage."""
    table = Table(title=f"{type(config).__name__}, rank {config.r}", title_justify="left")
    for column in ("module", "what", "learns"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
