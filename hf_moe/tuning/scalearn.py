"""ScaLearn: learn how much of several trained adapters a task wants, and nothing else (https://arxiv.org/abs/2310.01217).

    y = W x + sum over sources s of w_s * (scale_s B_s A_s x)

where w_s is a vector (O,), or one number (`uniform`), of each layer or shared by all (`shared`, the paper's "++").
Letters: S sources, D inputs, O outputs of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn

from .peft_types import register
from .replacing import OneKindTuner
from .routed_lora import check_linear
from .targets import TargetsConfig

PREFIX = "base_model.model."
Source = tuple[torch.Tensor, torch.Tensor, float]  # A (r, D), B (O, r), scale


@dataclass
class ScalearnConfig(TargetsConfig):
    """Options of ScaLearn. All w start at 0, so that the layer is what it was; the start is our choice.

    Args:
        sources: folders or hub ids of LoRA adapters of the same base, on linear layers. They are read again whenever
            the adapter is loaded; only w is saved.
        target_modules: default: all modules of the sources.
        uniform: one number per source in place of a vector.
        shared: layers of the same name, or with `uniform` all layers, share their w: S numbers in the smallest case.
    """

    method: ClassVar[str] = "scalearn"

    sources: list[str] = field(default_factory=list, metadata={"help": "Folders or hub ids of trained adapters."})
    uniform: bool = field(default=False, metadata={"help": "One number per source in place of a vector."})
    shared: bool = field(default=False, metadata={"help": "Layers share their numbers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = [str(source) for source in self.sources]
        if not self.sources:
            raise ValueError("sources is empty: ScaLearn scales adapters that are trained already.")


class Scalearn(nn.Module, BaseTunerLayer):
    """w (S, O) or (S, 1) of a linear layer, unless another layer has it for both."""

    adapter_layer_names = ("scalearn_w",)
    other_param_names = ("sources", "owners")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        check_linear(base_layer, name)
        self.base_layer, self.layer_name = base_layer, name
        self.scalearn_w = nn.ParameterDict()
        self.scalearn_A, self.scalearn_B = BufferDict(persistent=False), BufferDict(persistent=False)
        self.sources: dict[str, dict[int, float]] = {}  # adapter -> number of the source -> scale
        self.owners: dict[str, list[Scalearn]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(
        self, adapter: str, config: ScalearnConfig, found: Mapping[int, Source], owners: dict[str, "Scalearn"]
    ) -> None:
        """Add an adapter; `owners` says which layer has w for a group of layers that share one."""
        base: Any = self.get_base_layer()
        key = "all" if config.uniform else self.layer_name.rpartition(".")[2]
        owner = owners.setdefault(key, self) if config.shared else self
        self.owners[adapter] = [owner]  # in a list: it must not become a submodule
        self.sources[adapter] = {number: scale for number, (_, _, scale) in found.items()}
        for number, (a, b, _) in found.items():
            for buffers, matrix in ((self.scalearn_A, a), (self.scalearn_B, b)):
                buffers[f"{adapter}_{number}"] = matrix.to(base.weight.device, torch.float32)
        width = 1 if config.uniform else base.out_features
        if owner is self:
            self.scalearn_w[adapter] = nn.Parameter(torch.zeros(len(config.sources), width, device=base.weight.device))
        elif owner.scalearn_w[adapter].shape[1] != width:
            raise ValueError(
                f"shared=True, but {self.layer_name!r} has {width} outputs and {owner.layer_name!r} "
                f"{owner.scalearn_w[adapter].shape[1]}: choose uniform=True, or shared=False."
            )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """The buffers are not named after adapters alone, so that PEFT would not find them."""
        for number in self.sources.get(adapter_name, ()):
            for buffers in (self.scalearn_A, self.scalearn_B):
                del buffers[f"{adapter_name}_{number}"]
        super().delete_adapter(adapter_name)

    def parts(self, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """w_s (O,) or (1,), A_s and `scale_s B_s` of every source that has this layer."""
        w = self.owners[adapter][0].scalearn_w[adapter]
        matrices: Any = (self.scalearn_A, self.scalearn_B)
        return [
            (w[number], matrices[0][f"{adapter}_{number}"], scale * matrices[1][f"{adapter}_{number}"])
            for number, scale in self.sources[adapter].items()
        ]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., D) -> (..., O)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        for adapter in () if self.disable_adapters or self.merged else self.active_adapters:
            for w, a, b in self.parts(adapter) if adapter in self.sources else ():
                update = F.linear(F.linear(x.to(a.dtype), a), b)
                result = result + (w.to(a.dtype) * update).to(result.dtype)
        return result

    def delta(self, adapter: str) -> torch.Tensor:
        """(O, D) what an adapter adds to the weight."""
        return torch.stack([w[:, None].float() * (b @ a) for w, a, b in self.parts(adapter)]).sum(0)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the weight; with `safe_merge`, only if the result is finite."""
        weight: Any = self.get_base_layer().weight
        for adapter in adapter_names or self.active_adapters:
            if not self.sources.get(adapter) or adapter in self.merged_adapters:
                continue
            merged = (weight.float() + self.delta(adapter)).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaN or infinite values in the merged weight of {self.layer_name!r}.")
            weight.data = merged
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out again."""
        weight: Any = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data = (weight.float() - self.delta(self.merged_adapters.pop())).to(weight.dtype)


class ScalearnModel(OneKindTuner):
    """PEFT's tuner for `ScalearnConfig`."""

    prefix, tuner_layer_cls, layer_class = "scalearn_", Scalearn, Scalearn

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        found = [read(source) for source in peft_config.sources]
        object.__setattr__(self, "found", found)  # before nn.Module's constructor, which PEFT's calls
        object.__setattr__(self, "layers_with_w", {})
        if peft_config.target_modules is None:
            peft_config.target_modules = {module for source in found for module in source}
        return peft_config

    def settings(self, peft_config: Any, name: str) -> tuple[Any, ...]:
        mine = {number: source[name] for number, source in enumerate(self.found) if name in source}
        if not mine:
            raise ValueError(f"{name!r} is in none of the sources: leave it out of target_modules.")
        return peft_config, mine, self.layers_with_w


def read(folder: str) -> dict[str, Source]:
    """Name of a module -> the matrices of a trained LoRA adapter.

    Raises:
        ValueError: another kind of adapter, or one on stacked experts.
    """
    config: Any = PeftConfig.from_pretrained(folder)
    if type(config) is not LoraConfig or config.use_dora or config.target_parameters or config.modules_to_save:
        raise ValueError(
            f"{folder}: {type(config).__name__} is no plain LoRA of linear layers, which ScaLearn scales."
        )
    tensors, found = load_peft_weights(folder, device="cpu"), {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[f"{module}.lora_B.weight"]
            module = module.removeprefix(PREFIX)
            alphas = config.alpha_pattern or {}
            alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
            found[module] = a, b, alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
    return found


register("scalearn", ScalearnConfig, ScalearnModel)
