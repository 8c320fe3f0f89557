"""Adapters of stacked experts as keys that vLLM and SGLang read, and back.

`per_expert`: one LoRA pair per expert and projection, named as in the model's checkpoint:
`base_model.model.model.layers.3.mlp.experts.7.gate_proj.lora_A.weight`, `block_sparse_moe.experts.7.w1` for Mixtral.
`stacked`: what PEFT saves for `target_parameters`: `experts.base_layer.lora_A.weight (E r, in)` for the first stack,
`experts.lora_A.weight` for `down_proj`, and `lora_B.weight (out, r E)`, whose columns run over experts fastest.

What vLLM reads (vllm-project/vllm, versions of late 2025 to 2026; read, not run):
`vllm/lora/lora_model.py`: both forms. `vllm/lora/lora_weights.py`, `pack_moe`: it asserts that every expert has all
three projections, so an adapter of some experts needs `fill=True`. `vllm/lora/model_manager.py`: models whose checkpoints
are stacked (`is_3d_moe_weight`, such as GPT-OSS) read the stacked form only. `vllm/lora/peft_helper.py`: one `r` and one
`lora_alpha` for all modules, no `rank_pattern`, no `modules_to_save`. So an export has one rank: smaller matrices are
padded with zeros, and where scales differ, B takes up the difference.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling import moe_layers
from .expert_subset import FIRST, check_experts, expert_modules

PREFIX, FILE, CONFIG = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
OTHER_NAMES = {  # model type -> block in checkpoints (None: as in the model), names of the projections
    "kimi_linear": ("block_sparse_moe", MIXTRAL_NAMES),
    "lfm2_moe": (None, MIXTRAL_NAMES),
    "minimax": ("block_sparse_moe", MIXTRAL_NAMES),
    "minimax_m2": ("block_sparse_moe", MIXTRAL_NAMES),
    "minimax_m3_vl": ("block_sparse_moe", MIXTRAL_NAMES),
    "mixtral": ("block_sparse_moe", MIXTRAL_NAMES),
}
Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = dict[str, torch.Tensor]
Base = str | Path | PreTrainedConfig | PreTrainedModel


@dataclass(frozen=True)
class Stacks:
    """The stacked experts of one layer: E experts of width D and inner width F.

    Args:
        name: of the experts module in the model.
        public: its name in checkpoints.
        names: `gate_proj`, `up_proj`, `down_proj` -> their names in checkpoints.
        has_gate, interleaved: as in `hf_moe.MoeLayer`.
    """

    name: str
    public: str
    names: Mapping[str, str]
    num_experts: int
    width: int
    inner: int
    has_gate: bool
    interleaved: bool

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(in, out) of both stacks."""
        return (self.width, self.inner * (2 if self.has_gate else 1)), (self.inner, self.width)

    def split(self, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """B of the first stack (..., out, r) -> B's of its projections."""
        if not self.has_gate:
            return {"up_proj": b}
        gate, up = (b[..., ::2, :], b[..., 1::2, :]) if self.interleaved else b.chunk(2, dim=-2)
        return {"gate_proj": gate, "up_proj": up}

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        if not self.has_gate:
            return parts["up_proj"]
        halves = [parts["gate_proj"], parts["up_proj"]]
        return torch.stack(halves, dim=-2).flatten(-3, -2) if self.interleaved else torch.cat(halves, dim=-2)


@dataclass
class Fused:
    """The adapters of one layer's experts: A (S, r, in) and B (S, out, r) of both stacks, one scale for all."""

    experts: list[int]
    first: Pair
    second: Pair


def export_adapter(
    adapter: str | Path, out: str | Path, base: Base, layout: str = "per_expert", fill: bool = False
) -> Path:
    """Write a LoRA adapter of stacked experts with keys for serving; it stays the same function.

    Args:
        adapter: folder of an `ExpertLoraConfig` or of PEFT's `LoraConfig` with `target_parameters`.
        out: folder to write; it must not exist.
        base: the model, its config, or its name or path.
        layout: `per_expert` or `stacked` (the head of this file says who reads which). `stacked` has all experts.
        fill: whether experts without an adapter get one of zeros, which vLLM needs.

    Returns:
        `out`.

    Raises:
        ValueError: another kind of adapter; routers or others that learn whole; DoRA, biases; keys that do not fit
            the base; an `out` that exists.
    """
    if layout not in ("per_expert", "stacked"):
        raise ValueError(f"layout={layout!r} is unknown; choose per_expert or stacked.")
    out = check_output(out)
    config, tensors = read(adapter)
    found = stacks_of(base)
    rank = max([config["r"], *(t.shape[-2] for n, t in tensors.items() if "lora_A_" in n), *ranks(config)])
    scale = scale_of(config, config["r"], config["lora_alpha"])
    written: Tensors = {}
    parameters: list[str] = []
    for stacks in found.values():
        fused = take_fused(tensors, stacks, config)
        if fused is None:
            continue
        fused = resize(fused, rank, module_scale(config, stacks.name) / scale)
        if layout == "stacked":
            written |= stacked_keys(filled(fused, stacks), stacks)
            parameters += [f"{stacks.name}.{stack}" for stack in (FIRST[stacks.has_gate], "down_proj")]
        else:
            written |= per_expert_keys(filled(fused, stacks) if fill else fused, stacks)
    if not written:
        raise ValueError(f"{adapter}: holds no adapters of stacked experts; it can be served as it is.")
    for module, (a, b) in take_pairs(tensors).items():
        a, b = pad(a, b, rank, module_scale(config, module) / scale)
        module = public_name(module, found) if layout == "per_expert" else module
        written |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    modules = [name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in written]
    if layout == "per_expert":
        targets = sorted({name.rsplit(".", 1)[-1] for name in modules})
    else:
        targets = sorted({name for name in modules if not re.search(r"\.experts(\.base_layer)?$", name)})
    new = plain_config(config, r=rank, lora_alpha=whole(alpha), target_modules=targets)
    return write(out, written, new | {"peft_type": "LORA", "target_parameters": parameters or None})


def import_adapter(adapter: str | Path, out: str | Path, base: Base) -> Path:
    """Write an adapter with one LoRA pair per expert and projection as one that `hf_moe.tuning` loads.

    Gate and up share their A in a stack. Where they come with different ones, `A = [A_gate; A_up]` and
    `B = [[B_gate, 0], [0, B_up]]` is exact, at twice the rank. Projections that are missing become zeros.

    Args:
        adapter: folder with keys as `export_adapter` writes them; experts may be missing.
        out: folder to write, an `ExpertLoraConfig`; it must not exist.
        base: the model, its config, or its name or path.

    Returns:
        `out`.

    Raises:
        ValueError: no such keys, keys or shapes that do not fit the base, another kind of adapter, an `out` that
            exists.
    """
    out = check_output(out)
    config, tensors = read(adapter)
    found = stacks_of(base)
    pairs = take_pairs(tensors)
    written: Tensors = {}
    experts: dict[str, list[int]] = {}
    own_ranks, own_alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    for stacks in found.values():
        fused, scale = take_experts(pairs, stacks, config)
        if fused is None:
            continue
        experts[stacks.name] = fused.experts
        rank = fused.first[0].shape[1]
        alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        if (rank, whole(alpha)) != (config["r"], config["lora_alpha"]):
            own_ranks[stacks.name], own_alphas[stacks.name] = rank, whole(alpha)
        for end, (a, b) in (("in", fused.first), ("out", fused.second)):
            written |= {f"{PREFIX}{stacks.name}.lora_A_{end}": a, f"{PREFIX}{stacks.name}.lora_B_{end}": b}
    if not written:
        raise ValueError(f"{adapter}: holds no keys such as experts.0.gate_proj.lora_A.weight of this base.")
    others = {own_name(module, found): pair for module, pair in pairs.items()}
    for module, (a, b) in others.items():
        written |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    new = plain_config(config, target_modules=sorted([*others, *experts]), experts=experts)
    patterns = {"rank_pattern": own_ranks, "alpha_pattern": own_alphas, "target_parameters": None}
    return write(out, written, new | patterns | {"peft_type": "EXPERT_LORA"})


def stacks_of(base: Base) -> dict[str, Stacks]:
    """Name of every experts module of a base model -> its stacks; no weights are loaded."""
    if isinstance(base, (str, Path)):
        base = AutoConfig.from_pretrained(base)
    if isinstance(base, PreTrainedConfig):
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(base)
    modules = {module: name for name, module in expert_modules(base).items()}
    block, names = OTHER_NAMES.get(base.config.model_type, (None, {}))
    found = {}
    for layer in moe_layers(base):
        if (name := modules.pop(layer.experts, None)) is None:
            continue
        check_experts(layer.experts, name)
        weight: Any = layer.experts.get_parameter("down_proj")
        width, inner = weight.shape[1:] if not layer.transposed else weight.shape[:0:-1]
        public = f"{layer.name.rpartition('.')[0]}.{block}{name.removeprefix(layer.name)}" if block else name
        found[name] = Stacks(
            name, public, names, layer.num_experts, width, inner, layer.has_gate, layer.interleaved
        )
    return found
