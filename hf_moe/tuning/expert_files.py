"""Names and shapes of single experts in files, as Transformers itself writes them; used to exchange adapters.

Letters: E experts, S experts of an adapter, F inner width, D width.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..modeling import MoeLayer, moe_layers
from .expert_subset import FIRST, check_experts

Base = str | Path | PreTrainedConfig | PreTrainedModel


@dataclass(frozen=True)
class ExpertNames:
    """One module of stacked experts.

    Args:
        module: its name in the model.
        layer: how its stacks are stored.
        files: (expert, projection) -> name of the module in files, such as `model.layers.0.mlp.experts.3.gate_proj`.
    """

    module: str
    layer: MoeLayer
    files: Mapping[tuple[int, str], str]

    @property
    def reads(self) -> tuple[str, ...]:
        """The projections in the first stack."""
        return ("gate_proj", "up_proj") if self.layer.has_gate else ("up_proj",)

    def split(self, first: torch.Tensor) -> dict[str, torch.Tensor]:
        """What belongs to the outputs of the first stack, (..., out, n), by projection."""
        if not self.layer.has_gate:
            return {"up_proj": first}
        halves = (first[..., ::2, :], first[..., 1::2, :]) if self.layer.interleaved else first.chunk(2, dim=-2)
        return dict(zip(self.reads, halves))

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        tensors = [parts[name] for name in self.reads]
        if self.layer.interleaved and len(tensors) == 2:
            return torch.stack(tensors, -2).flatten(-3, -2)
        return torch.cat(tensors, -2)


def base_model(base: Base) -> PreTrainedModel:
    """The model itself, or one without weights for a config, a name or a folder."""
    if isinstance(base, (str, Path)):
        base = AutoConfig.from_pretrained(base)
    if isinstance(base, PreTrainedConfig):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(base)
    return base


def names_in_files(model: PreTrainedModel) -> tuple[list[ExpertNames], dict[str, str]]:
    """What `save_pretrained` calls every single expert, and every other module with a weight.

    Transformers is asked: numbered weights go through its own conversion, and come out under the names of files.

    Returns:
        The experts of every MoE layer, and name of any other module -> its name in files.

    Raises:
        ValueError: experts that are not plain stacks, or that files hold as stacks too.
    """
    numbered: dict[str, torch.Tensor] = {}
    meaning: dict[float, tuple[str, int, str]] = {}

    def number(key: str, shape: tuple[int, ...], meanings: list[tuple[str, int, str]]) -> None:
        ids = torch.arange(len(meaning), len(meaning) + len(meanings), dtype=torch.float64)
        meaning.update(zip(ids.tolist(), meanings))
        numbered[key] = ids.view(shape)

    layers = {name: layer for layer in moe_layers(model) for name, m in model.named_modules() if m is layer.experts}
    for name, layer in layers.items():
        check_experts(layer.experts, name)
        reads = ("gate_proj", "up_proj") if layer.has_gate else ("up_proj",)
        experts = range(layer.num_experts)
        first = [(name, expert, read) for expert in experts for read in reads]
        number(f"{name}.{FIRST[layer.has_gate]}", (len(experts), len(reads), 1), first)
        number(f"{name}.down_proj", (len(experts), 1, 1), [(name, expert, "down_proj") for expert in experts])
    for key, parameter in model.named_parameters():
        if key.endswith(".weight") and parameter.dim() == 2:
            number(key, (1, 1), [(key.removesuffix(".weight"), -1, "")])
    files: dict[str, dict[tuple[int, str], str]] = {name: {} for name in layers}
    others: dict[str, str] = {}
    for key, tensor in revert_weight_conversion(model, numbered).items():
        if tensor.numel() != 1:
            continue
        module, expert, projection = meaning[tensor.item()]
        if expert < 0:
            others[module] = key.removesuffix(".weight")
        elif key.endswith(".weight"):
            files[module][expert, projection] = key.removesuffix(".weight")
    for name, layer in layers.items():
        if len(files[name]) != layer.num_experts * (3 if layer.has_gate else 2):
            raise ValueError(
                f"Files of {type(model).__name__} hold the experts {name!r} as stacks, and so do adapters for it: "
                "there are no names for single experts."
            )
    return [ExpertNames(name, layer, files[name]) for name, layer in layers.items()], others


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete.

    Raises:
        ValueError: the name is taken.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield draft
        os.chmod(draft, 0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def stored(names: ExpertNames, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (out, in), or a stack of such, as the model stores it; its own inverse."""
    return matrix.mT if names.layer.transposed else matrix


def plain(value: float) -> Any:
    """A number as JSON files have it: whole ones without a point."""
    return int(value) if float(value).is_integer() else value
