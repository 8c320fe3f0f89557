"""What each layer of a decoder is made of, ours or Transformers' own; equal neighbours are one row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..modeling import MoeLayer, moe_layers_if_any, shares_of, unwrapped
from ..modeling.feed_forwards.base import FeedForward

FEED_FORWARD_ENDINGS = ("mlp", "ffn", "feedforward")  # of the class names of dense native second halves


@dataclass(frozen=True)
class LayerRow:
    """A run of equal layers. Parts of ours have the names of the config, native ones those of their classes.

    Args:
        stack: path of the list that the layers stand in.
        first, last: numbers of the first and the last layer in it.
        mixer: attention or what stands in its place; empty where a layer has none.
        widths: of queries, keys and values, where those are plain projections.
        feed_forward: the second half, dense or sparse.
        feed_forward_width: hidden width of a dense one.
        router, experts: parts of a mixture; empty where the layer is dense.
        scoring: how the router makes scores of logits.
        num_experts, num_zero_experts: routed experts with and without parameters.
        top_k: experts of a token; None where the router does not choose a fixed number.
        expert_width: hidden width of one expert, None where it is no plain feed-forward.
        shared_width: hidden width of what every token passes through beside them; 0 for none, None if not known.
        parameters, active_parameters: of one layer; what several layers share is in none of them.
    """

    stack: str
    first: int
    last: int
    mixer: str
    widths: str
    feed_forward: str
    feed_forward_width: int | None
    router: str
    experts: str
    scoring: str
    num_experts: int
    num_zero_experts: int
    top_k: int | None
    expert_width: int | None
    shared_width: int | None
    parameters: int
    active_parameters: int


def layer_table(model: PreTrainedModel) -> list[LayerRow]:
    """The rows of a model, on any device, in order of depth."""
    mixtures = {layer.name: layer for layer in moe_layers_if_any(model)}
    shares = shares_of(model)
    stacks = stacks_of(model, list(mixtures))
    elsewhere = [m for name, m in mixtures.items() if not any(name.startswith(f"{stack}.") for stack, _ in stacks)]
    rows = []
    for stack, layers in stacks:
        singles = []
        for number, layer in enumerate(layers):
            inside = [m for name, m in mixtures.items() if f"{name}.".startswith(f"{stack}.{number}.")]
            if not list(parts_of(layer)):  # one block for the whole depth, which stands elsewhere (WideNet)
                inside = elsewhere
            singles.append(row_of(stack, number, layer, inside, model, shares))
        rows += fold(singles)
    return rows


def fold(rows: list[LayerRow]) -> list[LayerRow]:
    """Rows of single layers, equal neighbours joined."""
    joined: list[LayerRow] = []
    for row in rows:
        if joined and replace(joined[-1], first=row.first, last=row.last) == row:
            joined[-1] = replace(joined[-1], last=row.last)
        else:
            joined.append(row)
    return joined


def stacks_of(model: PreTrainedModel, mixtures: list[str]) -> list[tuple[str, nn.ModuleList]]:
    """The lists of layers that hold the mixtures; of a dense model, the largest list there is."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    holding = [(n, m) for n, m in outer if any(name.startswith(f"{n}.") for name in mixtures)]
    return holding or sorted(outer, key=lambda pair: -num_parameters(pair[1]))[:1]


def num_parameters(module: nn.Module) -> int:
    """How many there are in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def row_of(
    stack: str,
    number: int,
    layer: nn.Module,
    mixtures: list[MoeLayer],
    model: PreTrainedModel,
    shares: dict[Any, float],
) -> LayerRow:
    """One layer, whose mixtures are known."""
    halves, routers = second_halves(layer, mixtures), [m.gate for m in mixtures]
    mixers = [part for part in parts_of(layer) if not holds(halves + routers, part)]
    dense = [half for half in halves if not holds([m.module for m in mixtures], half)]
    names = [names_of(parts) for parts in (mixers, halves)]
    if not any(names):
        names = [spec.get("type", "") for spec in find_specs(model.config.block(number))]  # pyright: ignore
    parameters = list(layer.parameters())
    return LayerRow(
        stack=stack,
        first=number,
        last=number,
        mixer=names[0] + (kind_of_attention(model, number) if mixers else ""),
        widths=widths_of(mixers),
        feed_forward=names[1] or "".join(name_of(m.module) for m in mixtures),
        feed_forward_width=width_of(dense[0]) if dense else None,
        parameters=sum(p.numel() for p in parameters),
        active_parameters=round(sum(p.numel() * shares.get(p, 1.0) for p in parameters)),
        **facts_of(mixtures[0] if mixtures else None),
    )


def holds(modules: list[nn.Module], part: nn.Module) -> bool:
    """Whether a module is one of these."""
    return any(part is module for module in modules)


def find_specs(block: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the mixer and of the feed-forward in the spec of a block."""
    return [block.get(slot, {}) for slot in ("mixer", "feed_forward")]


def facts_of(layer: MoeLayer | None) -> dict[str, Any]:
    """What a row says about a mixture; of a layer without one, nothing."""
    if layer is None:
        numbers = {"num_experts": 0, "num_zero_experts": 0, "top_k": None, "expert_width": None, "shared_width": None}
        return {"router": "", "experts": "", "scoring": "", **numbers}
    gate, experts = unwrapped(layer.gate), unwrapped(layer.experts)
    varies = getattr(gate, "varies", False)
    return {
        "router": name_of(gate),
        "experts": name_of(experts),
        "scoring": layer.scoring,
        "num_experts": layer.num_experts,
        "num_zero_experts": layer.num_zero_experts,
        "top_k": None if varies else layer.top_k,
        "expert_width": expert_width(layer),
        "shared_width": 0 if layer.shared_experts is None else width_of(layer.shared_experts),
    }


def expert_width(layer: MoeLayer) -> int | None:
    """Hidden width of one routed expert."""
    try:
        return layer.expert_tensors(0)["down_proj"].shape[1]
    except ValueError:  # experts that are no stacks of plain feed-forwards
        return None


def parts_of(layer: nn.Module) -> Iterator[nn.Module]:
    """The children of a layer that are parts: no norms, no bare projections, nothing without matrices."""
    for child in layer.children():
        matrices = any(parameter.dim() > 1 for parameter in child.parameters())
        is_norm = type(child).__name__.endswith("RMSNorm")
        if matrices and not is_norm and not isinstance(child, nn.Linear | nn.Embedding):
            yield child


def second_halves(layer: nn.Module, mixtures: list[MoeLayer]) -> list[nn.Module]:
    """The parts of a layer that are feed-forwards; Gemma 4's experts stand in the layer itself."""
    known = [m.experts if m.whole_layer else m.module for m in mixtures]
    return [part for part in parts_of(layer) if holds(known, part) or is_feed_forward(part)]


def is_feed_forward(part: nn.Module) -> bool:
    """Whether a part, or each in a list of them, is a feed-forward, ours or native."""
    first = part[0] if isinstance(part, nn.ModuleList) else part
    return isinstance(first, FeedForward) or type(first).__name__.lower().endswith(FEED_FORWARD_ENDINGS)


def is_ours(module: nn.Module) -> bool:
    """Whether a part is one of this package."""
    return type(module).__module__.startswith("hf_moe.")


def names_of(parts: list[nn.Module]) -> str:
    """`attention`, or `Attention + 2 x HyperConnection`."""
    counts = Counter(map(name_of, parts))
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def name_of(module: nn.Module) -> str:
    """`top_k` for a part of ours, the class for a native one; of a list, how many and of what."""
    if isinstance(module, nn.ModuleList):
        return f"{len(module)} x {name_of(module[0])}"
    return type(module).__module__.rpartition(".")[2] if is_ours(module) else type(module).__name__


def kind_of_attention(model: PreTrainedModel, number: int) -> str:
    """` (sliding)` and so on, where the layers of a model differ."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if number >= len(kinds) or len({*kinds}) < 2 or is_ours(model.base_model):
        return ""
    return f" ({kinds[number].removesuffix('_attention')})"


def widths_of(mixers: list[nn.Module]) -> str:
    """`q 4096, k 1024, v 1024` for plain projections."""
    found = []
    for mixer in mixers:
        for name in ("q", "k", "v"):
            projection = getattr(mixer, f"{name}_proj", None)
            if isinstance(projection, nn.Linear):
                found.append(f"{name} {projection.out_features}")
    return ", ".join(found)


def width_of(module: Any) -> int | None:
    """Hidden width of a dense feed-forward, or of the first in a list of them: what its last matrix reads."""
    module = module[0] if isinstance(module, nn.ModuleList) else module
    for name in ("down_proj", "w2", "output_linear", "fc2", "dense_4h_to_h"):
        last = getattr(module, name, None)
        if isinstance(last, nn.Linear):
            return last.in_features
    return None
