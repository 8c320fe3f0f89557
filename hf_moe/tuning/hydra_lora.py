"""HydraLoRA: one A, several B, mixed by a dense router (https://arxiv.org/abs/2404.19245)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .peft_types import register
from .routed_lora import RoutedLora, RoutedLoraConfig, RoutedLoraModel, low_rank, router_weight


@dataclass
class HydraLoraConfig(RoutedLoraConfig):
    """`y = W x + s sum_i softmax(W_r x)_i B_i A x` (§3.2, eq. 4).

    Args:
        num_experts: how many B; the paper finds about 3 by clustering the data.
    """

    method: ClassVar[str] = "hydra_lora"

    num_experts: int = field(default=3, metadata={"help": "Number of B matrices."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1 or self.router_aux_loss_coef:
            raise ValueError(
                f"num_experts={self.num_experts} must be at least 1, and router_aux_loss_coef="
                f"{self.router_aux_loss_coef} 0: a router that uses all experts has no load to balance."
            )


class HydraLora(RoutedLora):
    """A (r, D), B (n, O, r), router (n, D)."""

    adapter_layer_names = ("hydra_A", "hydra_B", "hydra_gate")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hydra_A, self.hydra_B, self.hydra_gate = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

    def make(self, adapter: str, config: Any) -> None:
        base: Any = self.get_base_layer()
        self.hydra_A[adapter] = low_rank(config.r, base.in_features)
        self.hydra_B[adapter] = nn.Parameter(torch.zeros(config.num_experts, base.out_features, config.r))
        self.hydra_gate[adapter] = router_weight(config.num_experts, base.in_features)

    def update(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        gates = F.linear(tokens, self.hydra_gate[adapter]).softmax(-1)  # (N, n)
        hidden = F.linear(self.lora_dropout[adapter](tokens), self.hydra_A[adapter])  # (N, r)
        weighted = (gates[:, :, None] * hidden[:, None]).flatten(1)  # (N, n r): one product with all B side by side
        return F.linear(weighted, self.hydra_B[adapter].transpose(0, 1).flatten(1))


class HydraLoraModel(RoutedLoraModel):
    """PEFT's tuner for `HydraLoraConfig`."""

    prefix, tuner_layer_cls, layer_class = "hydra_", HydraLora, HydraLora


register("hydra_lora", HydraLoraConfig, HydraLoraModel)
