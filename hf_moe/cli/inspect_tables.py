"""What `hf-moe inspect` prints on a terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..analysis import Inspection, LayerRouting, LayerRow, ModelFacts, RoutingFacts

SHOWN = 8  # dead experts of a layer


def show_inspection(found: "Inspection") -> None:
    """Facts, layers, and the routing if it was measured."""
    from rich.console import Console

    console = Console()
    show_facts(console, found)
    show_layers(console, found.facts)
    if found.routing is not None:
        show_routing(console, found.routing)


def show_facts(console: "Console", found: "Inspection") -> None:
    """What the model is, in two columns."""
    from rich.table import Table
    from rich.text import Text

    from ..analysis.units import count, size

    facts = found.facts
    share = facts.active_parameters / facts.parameters
    table = Table(title=Text(found.model), show_header=False)
    rows = {
        "model type": f"{facts.model_type} ({facts.architecture})",
        "weights": facts.dtype + (f", quantised: {facts.quantization}" if facts.quantization else ""),
        "parameters": f"{facts.parameters:,} ({count(facts.parameters)})",
        "active per token": f"{facts.active_parameters:,} ({share:.1%})",
        "embedding, head": f"{facts.embedding_parameters:,}",
        "cache": describe_cache(facts),
        "on disk": "not on this machine" if found.disk_bytes is None else size(found.disk_bytes),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)


def describe_cache(facts: "ModelFacts") -> str:
    """What a sequence keeps."""
    from ..analysis.units import size

    if facts.cache_bytes_per_token is None:
        return f"not known: {facts.cache_note}"
    return f"{size(facts.cache_bytes_per_token)} per token + {size(facts.cache_bytes_fixed or 0)}"


def show_layers(console: "Console", facts: "ModelFacts") -> None:
    """What the layers are made of."""
    from rich.table import Table
    from rich.text import Text

    from ..analysis.report import layer_range
    from ..analysis.units import count

    several = len({row.stack for row in facts.layers}) > 1
    table = Table("layers", "mixer", "feed-forward", "parameters of one", show_lines=True)
    for row in facts.layers:
        sizes = f"{count(row.parameters)}\n{count(row.active_parameters)} active"
        where = f"{row.stack}\n{layer_range(row)}" if several else layer_range(row)
        table.add_row(*map(Text, (where, f"{row.mixer}\n{row.widths}".strip(), describe_feed_forward(row), sizes)))
    console.print(table)


def describe_feed_forward(row: "LayerRow") -> str:
    """A feed-forward, its experts and its router, in some lines."""
    from ..analysis.report import chosen_of, experts_of

    lines = [row.feed_forward]
    if row.feed_forward_width is not None:
        lines.append(f"dense width {row.feed_forward_width}")
    if row.num_experts:
        width = "" if row.expert_width is None else f" of width {row.expert_width}"
        lines.append(f"{experts_of(row)} {row.experts}{width}")
        lines.append(f"{row.router} ({row.scoring}), {chosen_of([row.top_k])}")
    if row.shared_width:
        lines.append(f"shared width {row.shared_width}")
    return "\n".join(lines)


def show_routing(console: "Console", routing: "RoutingFacts") -> None:
    """One row of figures per MoE layer, and what most of them do."""
    from rich.table import Table
    from rich.text import Text

    from ..analysis.units import layer_labels

    several = len(routing.tokens) > 1
    read = ", ".join(f"{name}: {tokens:,} tokens" for name, tokens in routing.tokens.items())
    names = ["layer", "experts", "per token", "MaxVio", "entropy", "confidence", "busiest"]
    table = Table(*names, *(["divergence"] if several else []), "dead experts", title=Text(f"Routing ({read})"))
    for label, layer in zip(layer_labels([layer.name for layer in routing.layers]), routing.layers, strict=True):
        numbers = [layer.experts_per_token, layer.max_vio, layer.entropy, layer.confidence]
        cells = [
            label,
            str(len(layer.loads)),
            *(f"{number:.2f}" for number in numbers),
            busiest(layer),
        ]
        cells += [f"{layer.divergence:.3f}"] if several and layer.divergence is not None else []
        table.add_row(*map(Text, cells), Text(dead(layer), style="bold red" if layer.dead_experts else ""))
    console.print(table)
    if routing.not_called:
        console.print(f"Not passed by text: {', '.join(routing.not_called)}", markup=False, soft_wrap=True)


def busiest(layer: "LayerRouting") -> str:
    """The expert with the largest load, and that load."""
    load = max(layer.loads)
    return f"{layer.loads.index(load)} ({load:.0%})"


def dead(layer: "LayerRouting") -> str:
    """The experts that were never chosen."""
    numbers = list(map(str, layer.dead_experts))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return ", ".join(numbers[:SHOWN]) + more or "none"
