"""ESFT's trained experts in the layout of the released checkpoints: one matrix per expert and projection.

DeepSeek's repository keeps what was trained under the names of the base model's files, e.g.
`model.layers.1.mlp.experts.3.gate_proj.weight`, beside `expert_cfg.json` with the selection, and nothing else: what is
frozen is not saved (deepseek-ai/ESFT, `esft.py`: frozen parameters become non-persistent buffers).
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from .esft import EsftConfig, load_selection, save_selection
from .expert_files import Base, base_model, names_in_files, new_folder, stored

PREFIX = "base_model.model."
SELECTION = "expert_cfg.json"


def export_esft(adapter: str | Path, out: str | Path, base: Base) -> Path:
    """Write a saved ESFT adapter as `model.safetensors` of single experts' matrices and `expert_cfg.json`.

    Args:
        adapter: folder of an `EsftConfig`.
        out: folder to write; it must not exist.
        base: the model, its config, its name or its folder; weights are not looked at.

    Returns:
        `out`. The tensors are the adapter's, bit for bit.

    Raises:
        ValueError: another kind of adapter, modules that learn whole, a model whose files hold stacks, an `out` that
            exists.
    """
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, EsftConfig) or config.modules_to_save:
        kind = f"modules_to_save={config.modules_to_save}" if isinstance(config, EsftConfig) else type(config).__name__
        raise ValueError(f"{adapter}: {kind} has no place in ESFT's layout, which holds routed experts only.")
    tensors, written = load_file(Path(adapter) / SAFETENSORS_WEIGHTS_NAME), {}
    for names in names_in_files(base_model(base))[0]:
        if names.module not in config.experts:
            continue
        first, second = (stored(names, tensors[f"{PREFIX}{names.module}.esft_{end}"]) for end in ("in", "out"))
        for row, expert in enumerate(config.experts[names.module]):
            parts = names.split(first[row]) | {"down_proj": second[row]}
            written |= {f"{names.files[expert, name]}.weight": part.contiguous() for name, part in parts.items()}
    with new_folder(out) as folder:
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
        save_selection(config.experts, folder / SELECTION)
    return Path(out)


def import_esft(folder: str | Path, out: str | Path, base: Base) -> Path:
    """Write a released ESFT checkpoint as an adapter that `PeftModel.from_pretrained` loads; undoes `export_esft`.

    Args:
        folder: with `expert_cfg.json` and one or more `*.safetensors`; tensors of other modules must not be there.
        out: folder to write; it must not exist.
        base: the model, its config, its name or its folder.

    Returns:
        `out`.

    Raises:
        ValueError: no files, experts of the selection without tensors, tensors that belong to no selected expert.
    """
    folder, model = Path(folder), base_model(base)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / SELECTION).is_file():
        raise ValueError(f"{folder}: holds no safetensors files beside {SELECTION}.")
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    chosen = {name: sorted(experts) for name, experts in load_selection(model, folder / SELECTION).items()}
    others = json.loads((folder / SELECTION).read_text())
    if whole := [key for key in ("shared_experts", "non_expert_modules") if others.get(key)]:
        raise ValueError(f"{folder}: trained {whole[0]} too, for which an adapter of routed experts has no place.")
    written = {}
    for names in names_in_files(model)[0]:
        experts = chosen.get(names.module, [])
        wanted = {(e, name): f"{names.files[e, name]}.weight" for e in experts for name in (*names.reads, "down_proj")}
        if missing := [key for key in wanted.values() if key not in found]:
            raise ValueError(f"{folder}: {missing[0]!r} is missing, though the selection has its expert.")
        if not experts:
            continue
        taken = {place: found.pop(key) for place, key in wanted.items()}
        first = [names.join({name: taken[e, name] for name in names.reads}) for e in experts]
        second = [taken[e, "down_proj"] for e in experts]
        for end, matrices in (("in", first), ("out", second)):
            written[f"{PREFIX}{names.module}.esft_{end}"] = stored(names, torch.stack(matrices)).contiguous()
    if found:
        raise ValueError(
            f"{folder}: {next(iter(found))!r} belongs to no selected expert; an adapter has no place for it."
        )
    with new_folder(out) as draft:
        save_file(written, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        EsftConfig(experts=chosen, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(str(draft))
    return Path(out)
