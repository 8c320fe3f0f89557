"""The experts that several layers share."""

from typing import Any

from torch import nn

from ..experts import EXPERTS
from ..parts import Part, build


class ExpertPool(Part):
    """The experts of r layers, in their order; the decoder owns them, so each parameter exists once."""

    def __init__(self, config: Any, layer_idx: int, num_experts: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = {"num_experts": num_experts, **spec}
        self.experts_attribute = EXPERTS[spec["type"]].attribute
        self.add_module(self.experts_attribute, build(EXPERTS, spec, config, layer_idx, num_experts))

    def extra_repr(self) -> str:
        return str(self.spec)  # two blocks that print the same share it


def pools(config: Any, layers_per_pool: int) -> list[list[int]]:
    """The layers of each pool: those of this kind, in groups of r."""
    kinds = [config.blocks[name].get("feed_forward", {}).get("type") for name in config.block_pattern]
    starts = enumerate(config.block_starts)
    layers = [layer for number, layer in starts if kinds[number % len(kinds)] == "pooled_moe"]
    return [layers[start : start + layers_per_pool] for start in range(0, len(layers), layers_per_pool)]


def build_pools(config: Any, layers_per_pool: int, num_experts: int, experts: dict[str, Any]) -> nn.ModuleList:
    """All pools, named as in a layer, for checkpoint patterns and sharding plans: `pools.0.mlp.experts`."""
    number = layers_per_pool * num_experts
    built = (ExpertPool(config, layers[0], number, experts) for layers in pools(config, layers_per_pool))
    return nn.ModuleList(nn.ModuleDict({"mlp": pool}) for pool in built)
