"""One small view of the MoE layers of any supported model, ours or native: what all tools are written against."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration import DecoderConfig
from .feed_forwards.chain_of_experts import ChainOfExperts
from .feed_forwards.moe import Moe
from .feed_forwards.pooled_moe import PooledMoe


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model; modules and tensors are the model's own, not copies.

    Args:
        name: path of the layer in the model, e.g. `model.layers.3.mlp`.
        module: the whole sparse feed-forward.
        gate: the router; its first output is the logits (N, E).
        experts: the stacked experts. Layers that share a pool (`pooled_moe`) each yield the same module.
        num_experts: routed experts E.
        num_zero_experts: experts without parameters that the router chooses among too, behind the others.
        scoring: `softmax` over all experts, `softmax_selected` over the chosen ones, or `sigmoid`.
        normalize: whether the chosen weights are divided by their sum.
        transposed: whether expert weights are stored (in, out) instead of (out, in).
        shared_experts: what every token passes through beside them, or None.
        selection_bias: (E,) added to the scores for the choice only (aux-loss-free balancing), or None.
        later_gates: the routers of the second and later iterations over the same experts (`chain_of_experts`).
    """

    name: str
    module: nn.Module
    gate: nn.Module
    experts: nn.Module
    num_experts: int
    scoring: str
    normalize: bool
    transposed: bool = False
    shared_experts: nn.Module | None = None
    selection_bias: torch.Tensor | None = None
    num_zero_experts: int = 0
    later_gates: tuple[nn.Module, ...] = ()

    @property
    def top_k(self) -> int:
        """Experts per token, as the next forward pass will use it."""
        return self.gate.top_k  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class NativeLayout:
    """Where a native Transformers family keeps the parts of its MoE layers (5.23)."""

    block: str  # class name of the sparse feed-forward
    scoring: str = "softmax"
    normalize: bool | None = None  # None: the gate's `norm_topk_prob` says
    shared: str | None = None
    bias: str | None = None


NATIVE = {
    "mixtral": NativeLayout("MixtralSparseMoeBlock", normalize=True),
    "qwen3_moe": NativeLayout("Qwen3MoeSparseMoeBlock"),
    "olmoe": NativeLayout("OlmoeSparseMoeBlock"),
    "qwen2_moe": NativeLayout("Qwen2MoeSparseMoeBlock", shared="shared_expert"),
    "flex_olmo": NativeLayout("FlexOlmoSparseMoeBlock"),
    "deepseek_v3": NativeLayout("DeepseekV3MoE", "sigmoid", shared="shared_experts", bias="e_score_correction_bias"),
}


def moe_layers(model: PreTrainedModel) -> Iterator[MoeLayer]:
    """Yield the MoE layers of a model in order of depth; a dense model of ours has none.

    Raises:
        ValueError: a native model type whose layout is not known; nothing is guessed from names or shapes.
    """
    model_type = model.config.model_type
    ours = isinstance(model.config, DecoderConfig)
    if not ours and model_type not in NATIVE:
        raise ValueError(
            f"The MoE layers of {model_type!r} are not known; choose from our own types and {sorted(NATIVE)}."
        )
    for name, module in model.named_modules():
        if isinstance(module, (Moe, ChainOfExperts, PooledMoe)):
            yield _our_layer(name, module, model)
        elif not ours and type(module).__name__ == NATIVE[model_type].block:
            yield _native_layer(name, module, NATIVE[model_type])


def _our_layer(name: str, module: Moe | ChainOfExperts | PooledMoe, model: PreTrainedModel) -> MoeLayer:
    gates: list[Any] = list(module.gate) if isinstance(module, ChainOfExperts) else [module.gate]
    decoder: Any = model.base_model
    owner = module.expert_pool(decoder.shared) if isinstance(module, PooledMoe) else module
    gate, *later_gates = gates
    experts: Any = getattr(owner, module.experts_attribute)
    return MoeLayer(
        name=name,
        module=module,
        gate=gate,
        experts=experts,
        num_experts=experts.num_experts,
        scoring=gate.scoring,
        normalize=gate.normalize,
        shared_experts=module.shared_expert,
        selection_bias=gate.e_score_correction_bias,
        num_zero_experts=gate.num_zero_experts,
        later_gates=tuple(later_gates),
    )


def _native_layer(name: str, module: nn.Module, layout: NativeLayout) -> MoeLayer:
    gate, experts = module.get_submodule("gate"), module.get_submodule("experts")
    return MoeLayer(
        name=name,
        module=module,
        gate=gate,
        experts=experts,
        num_experts=experts.num_experts,  # pyright: ignore[reportArgumentType]
        scoring=layout.scoring,
        normalize=bool(gate.norm_topk_prob) if layout.normalize is None else layout.normalize,
        transposed=bool(experts.is_transposed),
        shared_experts=module.get_submodule(layout.shared) if layout.shared else None,
        selection_bias=gate.get_buffer(layout.bias) if layout.bias else None,
    )
