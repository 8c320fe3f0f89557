"""LoRA for a subset of the stacked experts, beside stock LoRA for everything else."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from .expert_subset import ExpertSubset
from .peft_types import add_peft_type, register
from .replacing import adapt


@dataclass
class ExpertLoraConfig(LoraConfig):
    """LoRA whose targets may be stacked experts, some or all of a layer's.

    PEFT's own `target_parameters` computes `W + B A` for the whole stack in every forward pass, takes no dropout and
    no subset. Here an adapted expert computes `W x + s B A dropout(x)` for the tokens that chose it, and the others
    are left alone. The same numbers come out where all experts are adapted. `hf_moe.lora_config` makes such configs.

    Args:
        experts: name of an experts module, as in `model.named_modules()`, -> the experts to adapt; null means all.
    """

    experts: dict[str, list[int] | None] = field(
        default_factory=dict, metadata={"help": "Experts module -> experts to adapt; null for all of them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("expert_lora")
        # the order of the rows in every tensor
        self.experts = {name: ids if ids is None else sorted(set(ids)) for name, ids in self.experts.items()}
        unfit = {"use_dora": self.use_dora, "lora_bias": self.lora_bias}
        for name, value in unfit.items():
            if value:
                raise ValueError(f"{name}={value} is not possible for experts; leave it out.")


class ExpertLora(ExpertSubset):
    """LoRA matrices `A (S, r, in)` and `B (S, out, r)` for both stacks; gate and up share their A, as in PEFT."""

    adapter_layer_names = ("lora_A_in", "lora_B_in", "lora_A_out", "lora_B_out")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A_in, self.lora_B_in = nn.ParameterDict(), nn.ParameterDict()
        self.lora_A_out, self.lora_B_out = nn.ParameterDict(), nn.ParameterDict()

    def update_layer(self, adapter: str, r: int, lora_alpha: float, config: ExpertLoraConfig) -> None:
        """Add an adapter; it changes nothing until it is trained, for B is 0."""
        if r < 1:
            raise ValueError(f"r={r} must be at least 1.")
        chosen = self.add_experts(adapter, config.experts.get(self.layer_name))
        self.r[adapter], self.lora_alpha[adapter] = r, lora_alpha
        self.scaling[adapter] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        base: Any = self.get_base_layer()
        for stack, a, b in self.pairs():
            weight = getattr(base, stack)
            wide, narrow = weight.shape[1:] if not base.is_transposed else weight.shape[:0:-1]
            like = {"dtype": weight.dtype, "device": weight.device}
            a[adapter] = nn.Parameter(torch.empty(len(chosen), r, narrow, **like))
            b[adapter] = nn.Parameter(torch.zeros(len(chosen), wide, r, **like))
            if config.init_lora_weights is False:
                nn.init.normal_(b[adapter], std=0.02)
            for matrix in a[adapter]:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def pairs(self) -> Iterator[tuple[str, nn.ParameterDict, nn.ParameterDict]]:
        """Yield stack, A's and B's."""
        first, second = self.stacks
        yield first, self.lora_A_in, self.lora_B_in
        yield second, self.lora_A_out, self.lora_B_out

    def matrices(self, stack: str) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        """A's and B's of a stack."""
        return next((a, b) for name, a, b in self.pairs() if name == stack)

    def linear(self, x: torch.Tensor, stack: str, expert: int, active: Sequence[str]) -> torch.Tensor:
        result = self.base_linear(x, getattr(self.get_base_layer(), stack)[expert], stack, expert)
        a, b = self.matrices(stack)
        for adapter in active:
            if expert not in self.experts_of[adapter]:
                continue
            row = self.experts_of[adapter].index(expert)
            down = F.linear(self.lora_dropout[adapter](x.to(a[adapter].dtype)), a[adapter][row])
            result = result + (self.scaling[adapter] * F.linear(down, b[adapter][row])).to(result.dtype)
        return result

    def deltas(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield every adapted expert and `s B A`, stored as the base's matrices."""
        a, b = self.matrices(stack)
        for row, expert in enumerate(self.experts_of[adapter]):
            delta = self.scaling[adapter] * (b[adapter][row].float() @ a[adapter][row].float())
            yield expert, delta.T if self.get_base_layer().is_transposed else delta

    def merged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        for expert, delta in self.deltas(adapter, stack):
            weight = getattr(self.get_base_layer(), stack).data[expert]
            yield expert, (weight.float() + delta).to(weight.dtype)

    def unmerged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        for expert, delta in self.deltas(adapter, stack):
            weight = getattr(self.get_base_layer(), stack).data[expert]
            yield expert, (weight.float() - delta).to(weight.dtype)


class ExpertLoraModel(LoraModel):
    """PEFT's LoRA, with `ExpertLora` for the modules that the config's `experts` name."""

    tuner_layer_cls = BaseTunerLayer

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key not in lora_config.experts:
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
            return
        ranks, alphas = lora_config.rank_pattern, lora_config.alpha_pattern  # by PEFT's rules: names or their endings
        rank = ranks.get(get_pattern_key(list(ranks), current_key), lora_config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), current_key), lora_config.lora_alpha)
        make = partial(ExpertLora, name=current_key)
        adapt(self, make, ExpertLora, target, target_name, parent, adapter_name, rank, alpha, lora_config)


register("expert_lora", ExpertLoraConfig, ExpertLoraModel)
