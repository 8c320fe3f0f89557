"""Adapters of stacked experts as one LoRA pair per expert and projection, which vLLM and SGLang read, and back.

Keys are those of the model's files, e.g. `base_model.model.model.layers.3.mlp.experts.7.gate_proj.lora_A.weight`, for
Mixtral `block_sparse_moe.experts.7.w1`. What the engines do with them (read in their code, not run):

* SGLang (`python/sglang/srt/lora/mem_pool.py`, commit 00639c4): collects `experts.<n>.` keys per expert.
* vLLM (`vllm/lora/lora_weights.py`, `pack_moe`): wants all three projections of every expert, so that an adapter of a
  few needs `fill=True`; models whose files hold stacks (GPT-OSS) are served from PEFT's own form.
* vLLM (`vllm/lora/peft_helper.py`): one `r` and `lora_alpha` for all modules, no `modules_to_save`. So smaller ranks
  are padded with zeros here, and B takes up scales that differ.

Letters: S adapted experts, r rank, F inner width, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from .expert_files import Base, ExpertNames, base_model, names_in_files, new_folder, plain
from .expert_lora import ExpertLoraConfig
from .expert_subset import FIRST

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class StackedPairs:
    """The adapters of one module's experts: A (S, r, in) and B (S, out, r) of its first stack and of `down_proj`, and
    what multiplies either."""

    experts: list[int]
    first: Pair
    second: Pair
    scales: tuple[float, float] = (1.0, 1.0)


def export_adapter(adapter: str | Path, out: str | Path, base: Base, fill: bool = False) -> Path:
    """Write a LoRA adapter of stacked experts with a pair per expert; it stays the same function.

    Args:
        adapter: folder of an `ExpertLoraConfig`, or of PEFT's `LoraConfig` with `target_parameters`.
        out: folder to write; it must not exist.
        base: the model, its config, its name or its folder; weights are not looked at.
        fill: whether experts without an adapter get one of zeros, as vLLM wants. Files grow with all experts then.

    Returns:
        `out`.

    Raises:
        ValueError: another kind of adapter, modules that learn whole (merge those into the base), a model whose files
            hold stacks, an `out` that exists.
    """
    config, tensors = read(adapter)
    modules, others = names_in_files(base_model(base))
    stacks = {names.module: taken for names in modules if (taken := take_stacks(tensors, names, config)) is not None}
    if not stacks:
        raise ValueError(f"{adapter}: holds no adapters of stacked experts; it can be served as it is.")
    pairs = take_pairs(adapter, tensors)
    both = [pair for part in stacks.values() for pair in (part.first, part.second)]
    rank = max(a.shape[-2] for a, _ in (*both, *pairs.values()))
    scale = scale_of(config, "", rank=config.r)
    written: Tensors = {}
    for names in modules:
        if (found := stacks.get(names.module)) is not None:
            whole = filled(found, names) if fill else found
            written |= per_expert(whole, names, rank, found.scales[0] / scale, found.scales[1] / scale)
    for module, pair in pairs.items():
        a, b = resized(pair, rank, scale_of(config, module, pair[0].shape[0]) / scale)
        written |= keys(others.get(module, module), a, b)
    targets = sorted({key.removeprefix(PREFIX).rsplit(".", 3)[-3] for key in written})
    alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
    settings = {"r": rank, "lora_alpha": plain(alpha), "target_modules": targets, "use_rslora": config.use_rslora}
    return write(out, written, LoraConfig(**common(config), **settings))


def import_adapter(adapter: str | Path, out: str | Path, base: Base) -> Path:
    """Write an adapter with a LoRA pair per expert and projection as one that `PeftModel.from_pretrained` loads.

    Gate and up share their A in a stack. Where they come with different ones, `A = [A_gate; A_up]` and
    `B = [[B_gate, 0], [0, B_up]]` is the same function at twice the rank. Missing projections become zeros.

    Args:
        adapter: folder with keys as `export_adapter` writes them; experts may be missing.
        out: folder to write, with an `ExpertLoraConfig`; it must not exist.
        base: the model, its config, its name or its folder.

    Returns:
        `out`.

    Raises:
        ValueError: no such keys, keys or shapes that do not fit the base, an `out` that exists.
    """
    config, tensors = read(adapter)
    modules, others = names_in_files(base_model(base))
    pairs = take_pairs(adapter, tensors)
    written: Tensors = {}
    experts: dict[str, list[int]] = {}
    own: dict[str, tuple[int, float]] = {}  # module -> its rank and scale
    for names in modules:
        if (found := take_experts(pairs, names, config)) is None:
            continue
        experts[names.module] = found.experts
        own[names.module] = found.first[0].shape[1], 1.0 if has_patterns(config) else scale_of(config, "", config.r)
        for end, (a, b) in (("in", found.first), ("out", found.second)):
            written |= {f"{PREFIX}{names.module}.lora_A_{end}": a, f"{PREFIX}{names.module}.lora_B_{end}": b}
    if not experts:
        example = next(iter(modules[0].files.values()))
        raise ValueError(f"{adapter}: holds no keys such as {PREFIX}{example}.lora_A.weight.")
    in_model = {public: own_name for own_name, public in others.items()}
    if unknown := sorted(pairs.keys() - in_model.keys()):
        raise ValueError(f"{adapter}: {unknown[0]!r} is no module of this base model.")
    for module, (a, b) in pairs.items():
        written |= keys(in_model[module], a, b)
        own[in_model[module]] = a.shape[0], scale_of(config, module, a.shape[0])
    return write(out, written, imported_config(config, experts, own))


def imported_config(
    config: LoraConfig, experts: dict[str, list[int]], own: Mapping[str, tuple[int, float]]
) -> ExpertLoraConfig:
    """A config in which every module has a rank and a scale of its own, where they are not those of all."""
    usual = config.r, scale_of(config, "", config.r)
    special = {name: of for name, of in own.items() if of != usual}
    alphas = {
        name: scale * (math.sqrt(rank) if config.use_rslora else rank) for name, (rank, scale) in special.items()
    }
    return ExpertLoraConfig(
        **common(config),
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=list(own),
        experts=dict(experts),
        rank_pattern={name: rank for name, (rank, _) in special.items()},
        alpha_pattern={name: plain(alpha) for name, alpha in alphas.items()},
    )


def has_patterns(config: LoraConfig) -> bool:
    """Whether modules have ranks or scales of their own."""
    return bool(config.rank_pattern or config.alpha_pattern)


def read(adapter: str | Path) -> tuple[Any, Tensors]:
    """Config and tensors of a plain LoRA adapter's folder."""
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter}: is {type(config).__name__}; only LoRA has a form per expert.")
    refused = {"modules_to_save": config.modules_to_save, "use_dora": config.use_dora, "lora_bias": config.lora_bias}
    if wrong := [name for name, value in refused.items() if value]:
        raise ValueError(f"{adapter}: {wrong[0]}={refused[wrong[0]]} has no form per expert; merge the adapter.")
    return config, load_file(Path(adapter) / SAFETENSORS_WEIGHTS_NAME)


def common(config: LoraConfig) -> dict[str, Any]:
    """Settings that stay as they are."""
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "task_type": config.task_type,
        "lora_dropout": config.lora_dropout,
        "inference_mode": True,
    }


def scale_of(config: LoraConfig, module: str, rank: int) -> float:
    """What multiplies B A of a module."""
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), module), config.lora_alpha) if module else config.lora_alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def resized(pair: Pair, rank: int, factor: float) -> Pair:
    """A (..., r, in) and B (..., out, r) with zeros up to a rank, and B times a factor."""
    missing = rank - pair[0].shape[-2]
    a, b = torch.nn.functional.pad(pair[0], (0, 0, 0, missing)), torch.nn.functional.pad(pair[1], (0, missing))
    return a, b if factor == 1 else (b.float() * factor).to(b.dtype)


def keys(module: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    """PEFT's names for the pair of a linear layer."""
    return {f"{PREFIX}{module}.lora_A.weight": a.contiguous(), f"{PREFIX}{module}.lora_B.weight": b.contiguous()}


def take_pairs(adapter: str | Path, tensors: Tensors) -> dict[str, Pair]:
    """Take the pairs of linear layers out, by module; nothing may be left."""
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        found[module.removeprefix(PREFIX)] = tensors.pop(key), tensors.pop(f"{module}.lora_B.weight")
    if tensors:
        raise ValueError(
            f"{adapter}: {next(iter(tensors))!r} has no form per expert, only pairs of linear layers have."
        )
    return found


def take_stacks(tensors: Tensors, names: ExpertNames, config: Any) -> StackedPairs | None:
    """Take the adapters of one module's experts out, in whichever of the two forms they are saved."""
    path, number = f"{PREFIX}{names.module}", names.layer.num_experts
    if f"{path}.lora_A_in" in tensors:
        ids = config.experts[names.module]
        parts = [tensors.pop(f"{path}.lora_{side}_{end}") for end in ("in", "out") for side in "AB"]
        experts = list(range(number)) if ids is None else list(ids)
        scale = scale_of(config, names.module, parts[0].shape[1])
        return StackedPairs(experts, (parts[0], parts[1]), (parts[2], parts[3]), (scale, scale))
    if f"{path}.lora_A.weight" not in tensors:
        return None
    # PEFT nests the wrappers of both stacks in the order of the model's parameters: the first is the innermost
    stacks = FIRST[names.layer.has_gate], "down_proj"
    if f"{path}.base_layer.lora_A.weight" not in tensors:
        raise ValueError(f"{names.module!r} has an adapter of one stack: give both {stacks} in target_parameters.")
    found = {}
    for stack, inner in zip(stacks, (".base_layer", "")):
        a, b = (tensors.pop(f"{path}{inner}.lora_{side}.weight") for side in "AB")
        rank = a.shape[0] // number
        found[stack] = a.unflatten(0, (number, rank)), b.unflatten(1, (rank, number)).permute(2, 0, 1)
    first, second = found[stacks[0]], found[stacks[1]]
    scales = [scale_of(config, f"{names.module}.{stack}", found[stack][0].shape[1]) for stack in stacks]
    return StackedPairs(list(range(number)), first, second, (scales[0], scales[1]))


def filled(found: StackedPairs, names: ExpertNames) -> StackedPairs:
    """With zeros for the experts that have no adapter."""

    def fill(pair: Pair) -> Pair:
        whole = [part.new_zeros(names.layer.num_experts, *part.shape[1:]) for part in pair]
        for target, part in zip(whole, pair):
            target[found.experts] = part
        return whole[0], whole[1]

    return StackedPairs(list(range(names.layer.num_experts)), fill(found.first), fill(found.second), found.scales)


def per_expert(found: StackedPairs, names: ExpertNames, rank: int, first: float, second: float) -> Tensors:
    """A pair for every expert and projection; gate and up get the same A. B's are multiplied by a factor per stack."""
    found = StackedPairs(found.experts, resized(found.first, rank, first), resized(found.second, rank, second))
    parts = names.split(found.first[1])
    written: Tensors = {}
    for row, expert in enumerate(found.experts):
        for projection, b in parts.items():
            written |= keys(names.files[expert, projection], found.first[0][row].clone(), b[row])
        written |= keys(names.files[expert, "down_proj"], found.second[0][row], found.second[1][row])
    return written


def take_experts(pairs: dict[str, Pair], names: ExpertNames, config: LoraConfig) -> StackedPairs | None:
    """Take one module's experts out of the pairs, and stack them."""
    owned: dict[int, dict[str, Pair]] = {}
    for (expert, projection), public in names.files.items():
        if (pair := pairs.pop(public, None)) is not None:
            if has_patterns(config):  # an expert may have its own scale, the stack gets 1 and B the rest
                pair = resized(pair, pair[0].shape[0], scale_of(config, public, pair[0].shape[0]))
            owned.setdefault(expert, {})[projection] = pair
    if not owned:
        return None
    experts = sorted(owned)
    firsts = [first_pair(owned[expert], names) for expert in experts]
    seconds = [owned[expert].get("down_proj") for expert in experts]
    rank = max(pair[0].shape[0] for pair in (*firsts, *seconds) if pair is not None)
    return StackedPairs(experts, stack(firsts, rank, names, "down"), stack(seconds, rank, names, "up"))


def first_pair(owned: Mapping[str, Pair], names: ExpertNames) -> Pair | None:
    """One expert's A and B of the first stack, from those of gate and up."""
    found = [owned.get(projection) for projection in names.reads]
    if not any(found):
        return None
    known = next(pair for pair in found if pair is not None)
    found = [(pair[0], pair[1]) if pair is not None else (known[0], torch.zeros_like(known[1])) for pair in found]
    a = found[0][0]
    if not all(torch.equal(pair[0], a) for pair in found):
        a = torch.cat([pair[0] for pair in found])
        ranks = [pair[0].shape[0] for pair in found]
        found = [
            (a, torch.nn.functional.pad(b, (sum(ranks[:i]), sum(ranks[i + 1 :])))) for i, (_, b) in enumerate(found)
        ]
    return a, names.join(dict(zip(names.reads, (b for _, b in found))))


def stack(found: list[Pair | None], rank: int, names: ExpertNames, side: str) -> Pair:
    """A (S, r, in) and B (S, out, r) of pairs that may be missing or smaller."""
    known = next((pair for pair in found if pair is not None), None)
    if known is None:
        raise ValueError(f"{names.module!r} has no adapter of its {side}-going projections for any expert.")
    zeros = torch.zeros_like(known[0]), torch.zeros_like(known[1])
    whole = [resized(pair or zeros, rank, 1.0) for pair in found]
    return torch.stack([a for a, _ in whole]), torch.stack([b for _, b in whole])


def write(out: str | Path, tensors: Tensors, config: Any) -> Path:
    """Write an adapter's folder beside its name, and rename it."""
    with new_folder(out) as folder:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SAFETENSORS_WEIGHTS_NAME)
        config.save_pretrained(folder)
    return Path(out)
