"""How many parameters a model has, and how many of them one token uses: papers' "16B-A3B"."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .anatomy import MoeLayer, moe_layers_if_any, unwrapped
from .configuration import DecoderConfig
from .empty import empty_model
from .feed_forwards.chain_of_experts import ChainOfExperts
from .feed_forwards.moe import Moe
from .feed_forwards.peer import Peer
from .feed_forwards.pooled_moe import PooledMoe
from .feed_forwards.routed_ffn import RoutedFfn
from .feed_forwards.ultra_mem import UltraMem
from .mixers.mixture_of_attention import MixtureOfAttention
from .mixers.switch_head import SwitchHead

Use = tuple[nn.Parameter | None, float]  # a parameter, and the share of it that a token uses


class ParameterCounts(NamedTuple):
    """Parameters of a model."""

    total: int
    active: int  # that one token uses, embedding and head included
    embedding: int  # input embedding and head; tied ones count once


def count_parameters(config: PreTrainedConfig) -> ParameterCounts:
    """Count the parameters of a config's causal language model, ours or Transformers' own, without making it.

    Of stacked experts a token uses its router's `top_k`; with zero experts to choose from, the part of them that falls
    on true ones in perfect balance; with a router that may take all of them, all. What several experts share, and
    everything else, counts whole; so does the whole embedding, of which a token reads one row, as in most papers'
    figures.

    Raises:
        ValueError: a native mixture whose layers are not known.
    """
    return parameters_of(empty_model(config))


def parameters_of(model: Any) -> ParameterCounts:
    """`count_parameters` of a model that is there, on any device."""
    shares = shares_of(model)
    parameters = list(model.parameters())
    active = sum(p.numel() * shares.get(p, 1.0) for p in parameters)
    ends = {end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return ParameterCounts(sum(p.numel() for p in parameters), round(active), sum(p.numel() for p in ends))


def shares_of(model: Any) -> dict[nn.Parameter, float]:
    """Parameters of which a token uses only a share, and that share."""
    shares: Counter[nn.Parameter] = Counter()
    if isinstance(model.config, DecoderConfig):
        shared: Any = model.base_model.shared
        found = (use for module in model.modules() for use in uses(module, shared))
    else:
        found = native_uses(model)
    for parameter, share in found:
        if parameter is not None:
            shares[parameter] += share  # pyright: ignore[reportArgumentType] - a share is no whole number
    return {parameter: min(1.0, share) for parameter, share in shares.items()}


def uses(module: nn.Module, shared: nn.ModuleDict) -> Iterator[Use]:
    """What a module uses only a share of; several modules may use a part of one parameter."""
    match module:
        case Moe():
            yield from of_experts(module, module, module.gate)
        case ChainOfExperts():
            yield from of_experts(module, module, module.gate[0], module.num_iterations)
        case PooledMoe():
            yield from of_experts(module, module.expert_pool(shared), module.gate)
        case RoutedFfn():
            for linear in (module.gate_proj, module.up_proj, module.down_proj):
                yield linear.weight, module.gate.top_k / module.num_blocks
        case Peer():
            for table in (module.w_down, module.w_up):
                yield table, module.num_heads * module.top_k / table.shape[0]
        case UltraMem():
            table: Any = shared["memory"] if module.memory is None else module.memory
            for rows in (table.values, table.pre_values):
                yield rows, module.retrieval.keys.shape[0] * module.retrieval.top_k / table.values.shape[0]
        case MixtureOfAttention():
            for stacked in (module.q_proj, module.o_proj):
                yield stacked, module.gate.top_k / module.num_experts
        case SwitchHead():
            for stacked, gate in ((module.v_proj, module.v_gate), (module.o_proj, module.o_gate)):
                yield stacked, gate.top_k / gate.shape[1]


def of_experts(module: Any, owner: Any, gate: Any, choices: int = 1) -> Iterator[Use]:
    """The stacked parameters of the experts in `owner`, among which, and zero experts, a token chooses so often."""
    experts = getattr(owner, module.experts_attribute)
    for parameter in experts.parameters():
        if parameter.shape[0] == experts.num_experts:
            yield parameter, choices * gate.top_k / gate.num_experts


def native_uses(model: PreTrainedModel) -> Iterator[Use]:
    """What a token uses of the experts of Transformers' own families."""
    for layer in moe_layers_if_any(model):
        used = layer.top_k * layer.num_experts / (layer.num_experts + layer.num_zero_experts)
        for parameter in expert_parameters(layer):
            rows = parameter.shape[0] if parameter.dim() > 2 else layer.num_experts
            yield parameter, used / rows
    for module in model.modules():
        if type(module).__name__ == "JetMoeMoA":  # attention experts, which are no MoE layer
            moa: Any = module
            for stacked in (moa.input_linear.weight, moa.output_linear.weight):
                yield stacked, moa.top_k / moa.num_experts


def expert_parameters(layer: MoeLayer) -> Iterator[nn.Parameter]:
    """The stacked parameters of a layer's routed experts, without the router's and without what experts share.

    LongCat-Flash's first stack has rows for its zero experts too, which are never read (Transformers 5.23).
    """
    experts, routers = unwrapped(layer.experts), set(layer.gate.parameters())
    flat = hasattr(experts, "mlp") and hasattr(experts.mlp, "w1")  # DBRX: (E F, D)
    lengths = (layer.num_experts, layer.num_experts + layer.num_zero_experts)
    for parameter in layer.experts.parameters():
        stacks = parameter.shape[0] % layer.num_experts == 0 if flat else parameter.shape[0] in lengths
        if stacks and parameter not in routers:
            yield parameter
