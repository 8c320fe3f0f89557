"""An inspection as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

import math
from collections.abc import Callable, Sequence
from html import escape

from .charts import BLUE, EMPTY, FLAGGED, ORANGE, STEPS, bars, heat_map, legend, shade, square
from .facts import Inspection, ModelFacts
from .layer_table import LayerRow
from .routing import LayerRouting, RoutingFacts
from .style import CSS
from .units import count, layer_labels, size

BUSIEST = 4.0  # times the fair load that gets the full colour
DOUBLINGS = 1.0  # of the mean load of all domains that get the full colour


def html_report(found: Inspection) -> str:
    """The page."""
    facts, routing = found.facts, found.routing
    parts = [header(found), layers_section(facts)]
    if routing is not None:
        parts += [figures_section(routing), loads_section(routing), dead_section(routing), pairs_section(routing)]
        parts += [domains_section(routing)] if len(routing.tokens) > 1 else []
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(found.model)}: inspection</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(parts)}<footer>Written by hf-moe inspect.</footer></main></body></html>\n"
    )


def header(found: Inspection) -> str:
    """Name and facts."""
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in tiles_of(found)
    )
    kind = f"{found.facts.architecture}, {found.facts.model_type}"
    return f"<header><h1>{escape(found.model)}</h1><p>{escape(kind)}</p></header><dl>{tiles}</dl>"


def tiles_of(found: Inspection) -> list[tuple[str, str, str]]:
    """What, how much, and a remark."""
    facts = found.facts
    mixtures = [row for row in facts.layers if row.num_experts]
    num_layers, num_sparse = (sum(row.last - row.first + 1 for row in rows) for rows in (facts.layers, mixtures))
    kinds = sorted({(row.num_experts + row.num_zero_experts, row.top_k) for row in mixtures}, key=str)
    cache = facts.cache_bytes_per_token
    return [
        ("Parameters", count(facts.parameters), f"{facts.parameters:,}"),
        (
            "Active per token",
            count(facts.active_parameters),
            f"{facts.active_parameters / facts.parameters:.1%} of all",
        ),
        ("Layers", str(num_layers), f"{num_sparse} with routed experts"),
        ("Experts", ", ".join(f"{n}" for n, _ in kinds) or "none", chosen_of([k for _, k in kinds])),
        ("Cache per token", "not known" if cache is None else size(cache), facts.cache_note or "past every window"),
        (
            "Cache, fixed part",
            "not known" if cache is None else size(facts.cache_bytes_fixed or 0),
            "states and windows",
        ),
        (
            "Type of weights",
            facts.dtype,
            f"quantised: {facts.quantization}" if facts.quantization else "not quantised",
        ),
        ("On disk", "not here" if found.disk_bytes is None else size(found.disk_bytes), "safetensors"),
    ]


def chosen_of(top_k: Sequence[int | None]) -> str:
    """How many experts a token uses."""
    numbers = ", ".join("a varying number" if k is None else str(k) for k in dict.fromkeys(top_k))
    return f"{numbers} per token" if numbers else ""


Cell = tuple[str, str]  # what stands in a cell, and what stands below it, smaller
LAYER_COLUMNS: list[tuple[str, Callable[[LayerRow], Cell]]] = [
    ("Layers", lambda row: (layer_range(row), "")),
    ("Mixer", lambda row: (row.mixer, row.widths)),
    ("Feed-forward", lambda row: (row.feed_forward, width("dense, width", row.feed_forward_width))),
    ("Router", lambda row: (row.router, row.scoring)),
    ("Experts", lambda row: (experts_of(row), f"{row.experts} {width('of width', row.expert_width)}".strip())),
    ("Top-k", lambda row: ("" if not row.num_experts else "varies" if row.top_k is None else str(row.top_k), "")),
    ("Shared width", lambda row: (str(row.shared_width or ""), "")),
    ("Parameters", lambda row: (count(row.parameters), f"{count(row.active_parameters)} active")),
]
LEFT_COLUMNS = ("Layers", "Layer", "Mixer", "Feed-forward", "Router", "Experts")


def width(words: str, number: int | None) -> str:
    """`of width 768`, or nothing."""
    return "" if number is None else f"{words} {number}"


def layer_range(row: LayerRow) -> str:
    """`3`, or `4-11`."""
    return f"{row.first}" if row.first == row.last else f"{row.first}-{row.last}"


def experts_of(row: LayerRow) -> str:
    """`64`, or `512 + 256 zero`."""
    if not row.num_experts:
        return ""
    return f"{row.num_experts} + {row.num_zero_experts} zero" if row.num_zero_experts else str(row.num_experts)


def layers_section(facts: ModelFacts) -> str:
    """The table of layers; one per stack, where a model has several."""
    stacks = list(dict.fromkeys(row.stack for row in facts.layers))
    parts = ["<h2>Layers</h2>", note("Equal neighbours are one row; parameters are those of one layer.")]
    for stack in stacks:
        rows = [row for row in facts.layers if row.stack == stack]
        used = [(name, cell) for name, cell in LAYER_COLUMNS if any(any(cell(row)) for row in rows)]
        parts += [f"<h3>{escape(stack)}</h3>"] if len(stacks) > 1 else []
        parts.append(table([name for name, _ in used], [[cell(row) for _, cell in used] for row in rows]))
    return "".join(parts) + note(f"Outside the layers: {count(facts.parameters_outside_layers)} parameters.")


def figures_section(routing: RoutingFacts) -> str:
    """One row of figures per MoE layer."""
    read = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in routing.tokens.items())
    several = len(routing.tokens) > 1
    columns = ["Layer", "Experts", "Per token", "MaxVio", "Load entropy", "Dead", "Confidence", "Router entropy"]
    rows = []
    for label, layer in zip(layer_labels([layer.name for layer in routing.layers]), routing.layers, strict=True):
        numbers = [layer.experts_per_token, layer.max_vio, layer.entropy]
        cells = [label, str(len(layer.loads)), *(f"{number:.2f}" for number in numbers), str(len(layer.dead_experts))]
        cells += [f"{layer.confidence:.2f}", f"{layer.router_entropy:.2f}"]
        rows.append(cells + ([f"{layer.divergence:.3f}"] if several and layer.divergence is not None else []))
    explained = (
        "MaxVio is the largest load over the mean, less 1 (0 is even). Entropies are divided by their largest value "
        "(1 is even). Confidence is the share of the largest score in a token's scores, on average."
    )
    skipped = f" Not passed by text: {', '.join(routing.not_called)}." if routing.not_called else ""
    parts = ["<h2>Routing</h2>", note(f"Read: {read}. {explained}{skipped}")]
    return "".join(parts) + table(columns + (["Divergence"] if several else []), rows)


def loads_section(routing: RoutingFacts) -> str:
    """Layers by experts."""
    rows = [
        [FLAGGED if share == 0 else shade(share * len(layer.loads), BUSIEST) for share in layer.loads]
        for layer in routing.layers
    ]
    labels = layer_labels([layer.name for layer in routing.layers])
    stops = [(shade(1, BUSIEST), "1: fair"), (STEPS // 2, f"{BUSIEST / 2:g}"), (STEPS, f"{BUSIEST:g} or more")]
    drawing = heat_map(rows, labels, "Load of every expert in every layer")
    return (
        "<h2>Expert load</h2>"
        + note("Share of the assignments of a layer that an expert gets, times the number of experts.")
        + plot(drawing + legend([*stops, (FLAGGED, "dead: never chosen")]))
    )


def dead_section(routing: RoutingFacts) -> str:
    """Experts that nobody chose."""
    found = [layer for layer in routing.layers if layer.dead_experts]
    parts = ["<h2>Dead experts</h2>"]
    if not found:
        return "".join(parts) + note("None: every expert was chosen at least once.")
    total = sum(len(layer.dead_experts) for layer in found)
    parts.append(note(f"{total} never chosen by these texts. More text may still reach them."))
    items = (f"<li>{escape(layer.name)}: {', '.join(map(str, layer.dead_experts))}</li>" for layer in found)
    return "".join(parts) + f'<div class="box"><ul class="dead">{"".join(items)}</ul></div>'


def pairs_section(routing: RoutingFacts) -> str:
    """Co-activation, layer by layer."""
    largest = max(max(map(max, layer.coactivation)) for layer in routing.layers)
    if largest == 0:
        return "<h2>Co-activation</h2>" + note("Every token used one expert only.")
    figures = []
    for label, layer in zip(layer_labels([layer.name for layer in routing.layers]), routing.layers, strict=True):
        rows = [[shade(value, largest) for value in row] for row in layer.coactivation]
        drawing = square(rows, f"Co-activation of the experts of layer {label}")
        figures.append(
            f"<figure>{drawing}<figcaption>layer {escape(label)}{closest_pair(layer)}</figcaption></figure>"
        )
    explained = (
        "Row i, column j: of the tokens that chose expert i, the share that chose j too, P(j | i). Below each: "
        "the largest share of the layer."
    )
    stops = [(STEPS // 4, f"{largest / 4:.2f}"), (STEPS // 2, f"{largest / 2:.2f}"), (STEPS, f"{largest:.2f}")]
    return (
        "<h2>Co-activation</h2>"
        + note(explained)
        + plot(f'<div class="grid">{"".join(figures)}</div>' + legend(stops))
    )


def closest_pair(layer: LayerRouting) -> str:
    """The largest share of a layer, in words."""
    share, first, second = max(
        (share, i, j) for i, row in enumerate(layer.coactivation) for j, share in enumerate(row)
    )
    return f": {first} to {second}, {share:.2f}" if share else ""


def domains_section(routing: RoutingFacts) -> str:
    """How differently the domains use the experts."""
    layers = routing.layers
    labels, divergences = layer_labels([layer.name for layer in layers]), [layer.divergence or 0.0 for layer in layers]
    highest = nice_limit(max(divergences))
    explained = (
        "Jensen-Shannon divergence of the domains' loads: 0 if all use the experts alike, 1 if no two share any."
    )
    parts = ["<h2>Domains</h2>", note(explained)]
    parts.append(plot(bars(divergences, labels, "Divergence of the domains in every layer", highest)))
    parts.append(note("Below, the load of an expert in one domain over its mean load in all domains."))
    stops = [(2 * STEPS, "half or less"), (EMPTY, "the mean"), (STEPS, "twice or more"), (FLAGGED, "never chosen")]
    for name in routing.tokens:
        rows = [preferences(layer, name) for layer in layers]
        drawing = heat_map(rows, labels, f"Experts that {name} prefers and avoids", BLUE, ORANGE)
        parts.append(f"<h3>{escape(name)}</h3>" + plot(drawing + legend(stops, BLUE, ORANGE)))
    return "".join(parts)


def preferences(layer: LayerRouting, domain: str) -> list[int]:
    """The palette's entries for what a domain does with the experts of a layer."""
    dead = {*layer.dead_experts}
    return [FLAGGED if e in dead else doubling(ratio) for e, ratio in enumerate(layer.specialization[domain])]


def doubling(ratio: float) -> int:
    """The palette's entry for a ratio, on a scale of doublings."""
    return shade(math.log2(ratio) if ratio > 0 else -DOUBLINGS, DOUBLINGS)


def nice_limit(value: float) -> float:
    """The top of an axis: 1, 0.5, 0.2, 0.1, 0.05 and so on, at least as large as the value."""
    limits = (step * 10.0**-power for power in range(4, -1, -1) for step in (1, 2, 5))
    return next((limit for limit in limits if limit >= value), 1.0)


def note(content: str) -> str:
    """A remark in a softer colour."""
    return f'<p class="note">{escape(content)}</p>'


def plot(drawing: str) -> str:
    """A box that scrolls by itself when it is too wide."""
    return f'<div class="box plot">{drawing}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """A table in a box that scrolls by itself; a cell is a text, or one with a smaller one below."""
    sides = [' class="left"' if column in LEFT_COLUMNS else "" for column in columns]
    head = "".join(f"<th{side}>{escape(column)}</th>" for side, column in zip(sides, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{side}>{cell_content(cell)}</td>" for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell_content(cell: str | Cell) -> str:
    """What stands between the tags."""
    first, below = (cell, "") if isinstance(cell, str) else cell
    return escape(first) + (f"<small>{escape(below)}</small>" if below else "")
