"""One small view of the MoE layers of any supported model, ours or native: what all tools are written against."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration import DecoderConfig
from .feed_forwards.chain_of_experts import ChainOfExperts
from .feed_forwards.moe import Moe
from .feed_forwards.pooled_moe import PooledMoe
from .native_layouts import NATIVE, SECOND_BLOCKS, UNSUPPORTED, NativeLayout
from .routers.base import Router
from .routers.frozen import Frozen
from .routers.top_k import TopK


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
        scoring: `softmax` over all experts, `softmax_selected` over the chosen ones, `sigmoid`, `score_fn` (the gate's
            own function) or `sparse_mixer` (Phi-3.5).
        normalize: whether the chosen weights are divided by their sum.
        transposed: whether expert weights are stored (in, out) instead of (out, in).
        shared_experts: what every token passes through beside them, or None.
        selection_bias: (E,) added to the scores for the choice only (aux-loss-free balancing), or None.
        interleaved: whether the rows (transposed: columns) of gate and up take turns in the fused weight (GPT-OSS).
        has_gate: whether the experts have a gate projection; without one the first weight is `up_proj` (Nemotron).
        least_top_k: the smallest number of experts per token that the layer's code can run.
        most_top_k: the largest, where that is not all.
        top_k_at: path from `module` to where the number is kept, where that is not the gate's `top_k`.
        learns_choice: False where a token's id decides, not the router (DeepSeek-V4's first layers).
        whole_layer: whether `module` is the whole decoder layer, attention included (Gemma 4).
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
    interleaved: bool = False
    has_gate: bool = True
    least_top_k: int = 1
    most_top_k: int | None = None
    top_k_at: str | None = None
    learns_choice: bool = True
    whole_layer: bool = False

    @property
    def top_k(self) -> int:
        """Experts per token, as the next forward pass will use it."""
        if self.top_k_at is None:
            return unwrapped(self.gate).top_k
        owner, name = _place(self.module, self.top_k_at)
        return getattr(owner, name)

    def set_top_k(self, top_k: int) -> None:
        """Let every token use so many experts from now on; the config keeps its own number.

        Raises:
            ValueError: fewer than `least_top_k`, more than there are, or than the groups of a group-limited router
                hold; a router that does not choose a fixed number.
        """
        gates: tuple[Any, ...] = tuple(map(unwrapped, (self.gate, *self.later_gates)))
        if not self.learns_choice:
            raise ValueError(f"The router of {self.name!r} looks experts up by token: their number cannot be set.")
        most = min([*map(self._most, gates), self.most_top_k or self.num_experts + self.num_zero_experts])
        if not self.least_top_k <= top_k <= most:
            raise ValueError(f"top_k={top_k} must be {self.least_top_k} to {most}.")
        if self.top_k_at is not None:
            _set_own(self.module, self.top_k_at, top_k)
            return
        for gate in gates:
            gate.top_k = top_k

    def _most(self, gate: Any) -> int:
        """How many experts a router can choose."""
        if isinstance(gate, Router) and not isinstance(gate, (TopK, Frozen)):
            raise ValueError(f"The number of experts that {type(gate).__name__} chooses cannot be set.")
        total = self.num_experts + self.num_zero_experts
        groups = getattr(gate, "num_groups", None) or getattr(gate, "num_group", None) or 1
        kept = getattr(gate, "groups_per_token", None) or getattr(gate, "topk_group", None) or groups
        return total * min(kept, groups) // groups

    def expert_tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's matrices, (out, in), as views of the stacks: writing into them writes into the model.

        Returns:
            `gate_proj` and `up_proj` (F, D), `down_proj` (D, F); no `gate_proj` where the experts have none; their
            biases, where they have some, as `gate_proj_bias` and so on.

        Raises:
            ValueError: experts that are not stacks of plain feed-forwards.
        """
        experts = unwrapped(self.experts)
        if hasattr(experts, "mlp") and hasattr(experts.mlp, "w1"):  # DBRX
            flat = (getattr(experts.mlp, name).data for name in ("w1", "v1", "w2"))
            gate, up, down = (part.view(self.num_experts, -1, experts.hidden_size)[expert] for part in flat)
            return {"gate_proj": gate, "up_proj": up, "down_proj": down.mT}
        if hasattr(experts, "input_linear"):
            stacks = {"first": experts.input_linear.weight, "down_proj": experts.output_linear.weight}
        else:
            first = "gate_up_proj" if self.has_gate else "up_proj"
            names = {"first": first, "down_proj": "down_proj"}
            names |= {f"{key}_bias": f"{name}_bias" for key, name in names.items()}
            stacks = {key: getattr(experts, name, None) for key, name in names.items()}
        found = {key: stack.data[expert] for key, stack in stacks.items() if stack is not None}
        if not {"first", "down_proj"} <= set(found) or found["first"].dim() != 2:
            raise ValueError(f"The experts of {self.name!r} ({type(experts).__name__}) are not plain stacks.")
        if self.transposed:
            found = {key: tensor.mT if tensor.dim() == 2 else tensor for key, tensor in found.items()}
        return self._halves(found)

    def _halves(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first matrix, and its bias, as those of gate and up."""
        halves = {}
        for ending in ("", "_bias"):
            if (first := tensors.pop(f"first{ending}", None)) is None:
                continue
            if not self.has_gate:
                halves[f"up_proj{ending}"] = first
                continue
            gate, up = (first[::2], first[1::2]) if self.interleaved else first.chunk(2)
            halves |= {f"gate_proj{ending}": gate, f"up_proj{ending}": up}
        return halves | tensors


BLOCKS_OF_NATIVES = {layout.block: layout for layout in (*NATIVE.values(), *SECOND_BLOCKS)}


def moe_layers(model: PreTrainedModel) -> Iterator[MoeLayer]:
    """Yield the MoE layers of a model in order of depth; a dense model of ours has none.

    Raises:
        ValueError: a native model type whose layout is not known; nothing is guessed from names or shapes.
    """
    ours, found = isinstance(model.config, DecoderConfig), False
    for name, module in model.named_modules():
        if isinstance(module, (Moe, ChainOfExperts, PooledMoe)):
            yield _our_layer(name, module, model)
        elif not ours and (layout := _layout_of(module)) is not None:
            found = True
            if layout.needs and not getattr(module, layout.needs):
                continue
            yield _native_layer(name, module, layout)
    if not ours and not found:
        _check_type(model.config.model_type)


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def moe_layers_if_any(model: PreTrainedModel) -> list[MoeLayer]:
    """The MoE layers of a model; a native dense model has none.

    Raises:
        ValueError: a native mixture whose layout is not known.
    """
    try:
        return list(moe_layers(model))
    except ValueError:
        text = model.config.get_text_config()
        if model.config.model_type in UNSUPPORTED or any(getattr(text, name, None) for name in EXPERT_COUNTS):
            raise
        return []


SELECTIONS = {"softmax": "softmax_selected", "sigmoid": "sigmoid"}  # Cohere 2's `expert_selection_fn`


def _place(module: Any, path: str) -> tuple[Any, str]:
    """The object that holds what a path from a module leads to, and its name there."""
    *steps, name = path.split(".")
    for step in steps:
        module = getattr(unwrapped(module), step)
    return module, name


def _set_own(module: nn.Module, path: str, value: int) -> None:
    """Set a number at a path; a config on the way, which other layers read too, is copied first."""
    owner, name = _place(module, path)
    if isinstance(owner, PreTrainedConfig):
        holder, attribute = _place(module, path.rpartition(".")[0])
        owner = copy(owner)
        setattr(unwrapped(holder), attribute, owner)
    setattr(owner, name, value)


def _layout_of(module: nn.Module) -> NativeLayout | None:
    """The layout of a native block; FSDP2 makes a subclass of another name."""
    found = (BLOCKS_OF_NATIVES.get(kind.__name__) for kind in type(module).__mro__)
    return next((layout for layout in found if layout is not None), None)


def unwrapped(module: Any) -> Any:
    """What PEFT's wrappers are around: they hide the attributes of experts and routers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _check_type(model_type: str) -> None:
    """Raise `ValueError` for a native type without layers that we know, unless a config of it may have none."""
    if model_type in UNSUPPORTED:
        raise ValueError(f"The MoE layers of {model_type!r} are not supported: {UNSUPPORTED[model_type]}.")
    if model_type not in NATIVE and model_type.removesuffix("_text") not in NATIVE:
        raise ValueError(
            f"The MoE layers of {model_type!r} are not known; choose from our own types and {sorted(NATIVE)}."
        )


def _our_layer(name: str, module: Moe | ChainOfExperts | PooledMoe, model: PreTrainedModel) -> MoeLayer:
    gates: list[Any] = list(module.gate) if isinstance(module, ChainOfExperts) else [module.gate]
    decoder: Any = model.base_model
    owner = module.expert_pool(decoder.shared) if isinstance(module, PooledMoe) else module
    gate, *later_gates = gates
    experts: Any = getattr(owner, module.experts_attribute)
    router, stacks = unwrapped(gate), unwrapped(experts)
    return MoeLayer(
        name=name,
        module=module,
        gate=gate,
        experts=experts,
        num_experts=stacks.num_experts,
        scoring=router.scoring,
        normalize=router.normalize,
        shared_experts=module.shared_expert,
        selection_bias=router.e_score_correction_bias,
        num_zero_experts=router.num_zero_experts,
        later_gates=tuple(later_gates),
        has_gate=hasattr(stacks, "gate_up_proj"),
    )


def _native_layer(name: str, module: nn.Module, layout: NativeLayout) -> MoeLayer:
    gate: Any = module.get_submodule(layout.gate)
    experts: Any = module.get_submodule(layout.experts)
    router, stacks = unwrapped(gate), unwrapped(experts)
    return MoeLayer(
        name=name,
        module=module,
        gate=gate,
        experts=experts,
        num_experts=router.num_experts if not layout.experts else getattr(stacks, layout.num_experts),
        num_zero_experts=_number(stacks, layout.num_zero_experts),
        least_top_k=layout.least_top_k,
        most_top_k=layout.most_top_k,
        top_k_at=layout.top_k,
        learns_choice=not hasattr(router, "tid2eid"),
        whole_layer=layout.whole_layer,
        scoring=layout.scoring or SELECTIONS[router.expert_selection_fn],
        normalize=bool(router.norm_topk_prob) if layout.normalize is None else layout.normalize,
        transposed=bool(getattr(stacks, "is_transposed", False) if layout.transposed is None else layout.transposed),
        interleaved=not getattr(stacks, "is_concatenated", True),
        has_gate=bool(getattr(stacks, "has_gate", True)),
        shared_experts=getattr(module, layout.shared, None) if layout.shared else None,
        selection_bias=_bias(module, layout.bias),
    )


def _number(stacks: Any, given: str | int | None) -> int:
    """A number that is given, or the name of an attribute that has it."""
    return getattr(stacks, given) if isinstance(given, str) else given or 0


def _bias(module: nn.Module, path: str | None) -> torch.Tensor | None:
    """The tensor at a path from a module, if its config has it."""
    found: Any = module
    for attribute in path.split(".") if path else ():
        found = getattr(unwrapped(found), attribute, None)
    if not isinstance(found, torch.Tensor):
        return None
    return found if found.dim() == 1 else found.detach().flatten()  # Ernie's is (1, E); the same memory
