"""What adapters have in common that choose, token by token, which of their low-rank matrices a linear layer uses.

Letters: N tokens, D width of the input, O of the output, r ranks, n LoRA experts, K chosen per token.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..modeling.losses import switch_loss
from ..modeling.ops.injection import inject
from ..modeling.router_calls import CurrentRows
from .replacing import OneKindTuner
from .targets import TargetsConfig


@dataclass
class RoutedLoraConfig(TargetsConfig):
    """Options of all routed adapters; methods add theirs.

    Args:
        target_modules: names or a pattern of linear layers, as in LoRA. Default: PEFT's for the model type.
        r: rank of one LoRA expert (SMoRA: all ranks together).
        lora_alpha: the update is multiplied by `lora_alpha / r`.
        lora_dropout: on the input of the update.
        router_aux_loss_coef: of the balance loss, per adapted layer; see `set_accumulation`.
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is multiplied by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Coefficient of the balance loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or self.router_aux_loss_coef < 0:
            raise ValueError(f"r={self.r} must be at least 1, router_aux_loss_coef={self.router_aux_loss_coef} 0.")


def check_top_k(top_k: int, number: int, of: str) -> None:
    """Raise `ValueError` unless so many can be chosen."""
    if not 1 <= top_k <= number:
        raise ValueError(f"top_k={top_k} must be 1 to {number} ({of}).")


class RoutedLora(nn.Module, BaseTunerLayer):
    """A linear layer with an update that depends on the token; methods say which."""

    other_param_names = ("configs", "r", "scaling", "lora_dropout")

    def __init__(self, base_layer: nn.Module, name: str, rows: CurrentRows) -> None:
        super().__init__()
        check_linear(base_layer, name)
        self.base_layer, self.layer_name, self.rows = base_layer, name, rows
        self.configs: dict[str, Any] = {}
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.loss_share = 1.0
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter that changes nothing yet."""
        self.configs[adapter], self.r[adapter] = config, config.r
        self.scaling[adapter] = config.lora_alpha / config.r
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.make(adapter, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., D) -> (..., O)."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter in () if self.disable_adapters else self.active_adapters:
            if adapter in self.configs:
                update = self.update(adapter, x.to(self.weight_dtype(adapter)).flatten(0, -2))
                result = result + (self.scaling[adapter] * update).view(*x.shape[:-1], -1).to(result.dtype)
        return result

    def make(self, adapter: str, config: Any) -> None:
        """Create the parameters of an adapter."""
        raise NotImplementedError

    def update(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        """(N, O) the update of tokens (N, D), before scaling."""
        raise NotImplementedError

    def weight_dtype(self, adapter: str) -> torch.dtype:
        """Type of an adapter's parameters."""
        return getattr(self, self.adapter_layer_names[0])[adapter].dtype

    def balanced(self, adapter: str, x: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """`x`, with the balance loss of scores (N, n) and choices (N, K) on its way back."""
        coef = self.configs[adapter].router_aux_loss_coef if self.training else 0.0
        return with_balance_loss(x, scores, chosen, coef * self.loss_share, self.rows)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            f"{type(self).__name__} chooses per token: it cannot be merged. Keep the adapter, or unload()."
        )

    def unmerge(self) -> None:
        """Nothing was merged."""


def with_balance_loss(
    x: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, coef: float, rows: CurrentRows
) -> torch.Tensor:
    """`x`, whose backward pass brings the balance loss to the router, whatever the trainer makes of its loss.

    Args:
        x: anything that the loss depends on.
        scores: (N, n) of the router.
        chosen: (N, K).
        coef: of Switch's loss, 1 at balance; 0 for none.
        rows: of the current forward pass, which tell padding.
    """
    if not coef or not scores.requires_grad:
        return x
    mask = rows.context.token_mask
    fits = mask is not None and len(mask) == len(scores)
    loss = switch_loss(scores, chosen, torch.ones_like(chosen, dtype=scores.dtype), mask if fits else None)
    return inject(x, coef * loss)


def check_linear(layer: nn.Module, name: str) -> None:
    """Raise `ValueError` if a layer cannot be adapted."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if not isinstance(base, nn.Linear):
        raise ValueError(f"{name!r} is {type(base).__name__}, no linear layer: leave it out of target_modules.")
    if not base.weight.is_floating_point():
        raise ValueError(f"{name!r} is quantised ({base.weight.dtype}): load the base model in bfloat16.")


def low_rank(*shape: int) -> nn.Parameter:
    """LoRA's A `(..., r, D)`: Kaiming-uniform by the input, as in `nn.Linear`."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def router_weight(number: int, width: int, std: float = 0.02) -> nn.Parameter:
    """(number, width) from a normal distribution."""
    return nn.Parameter(torch.randn(number, width) * std)


class RowsTuner(BaseTuner):
    """A tuner whose layers know the rows of the current forward pass, and with them what is padding."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        rows = CurrentRows()
        # before nn.Module's constructor, which PEFT's calls
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "rows_hook", rows.follow(model))
        super().__init__(model, *args, **kwargs)

    def unload(self) -> nn.Module:
        """The model as it was."""
        self.rows_hook.remove()
        return super().unload()


class RoutedLoraModel(RowsTuner, OneKindTuner):
    """PEFT's tuner for routed adapters."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def make(self, base_layer: nn.Module, name: str) -> nn.Module:
        return self.layer_class(base_layer, name, self.rows)


def set_accumulation(model: nn.Module, steps: int) -> None:
    """Tell routed adapters how many micro-batches make an optimizer step, so that their balance losses are averaged.

    The loss of every micro-batch counts 1 unless this is called: call it with `gradient_accumulation_steps` before
    training. Train with bf16, not fp16, whose loss scale these losses do not pass.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    for module in model.modules():
        if hasattr(module, "loss_share"):
            setattr(module, "loss_share", 1 / steps)  # noqa: B010 - of routed adapters, here and in MixLoRA
