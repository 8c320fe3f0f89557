"""MoLA: LoRA experts beside every linear layer, more of them in higher layers (https://arxiv.org/abs/2402.08562)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .peft_types import register
from .routed_lora import RoutedLora, RoutedLoraConfig, RoutedLoraModel, check_top_k, low_rank, router_weight


@dataclass
class MolaConfig(RoutedLoraConfig):
    """`y = W x + s sum_{i in top K} g_i B_i A_i x`, g the softmax over all experts, renormalised over the chosen.

    Args:
        num_experts: LoRA experts per linear layer, for equal parts of the depth: the paper's best is 2, 4, 6, 8.
        num_layers: of the model; needed where `num_experts` has several numbers.
        top_k: K; the paper has 2.
        router_aux_loss_coef: of Switch's balance loss; the paper has 0.001.
    """

    method: ClassVar[str] = "mola"

    num_experts: list[int] = field(default_factory=lambda: [8], metadata={"help": "Experts for parts of the depth."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the model."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    router_aux_loss_coef: float = field(default=1e-3, metadata={"help": "Coefficient of the balance loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.top_k, min(self.num_experts, default=0), "the smallest of num_experts")
        if len(self.num_experts) > 1 and not self.num_layers:
            raise ValueError(f"num_experts={self.num_experts} for parts of the depth need num_layers of the model.")

    def experts_in(self, layer: int) -> int:
        """How many LoRA experts the linear layers of a layer get."""
        if len(self.num_experts) == 1:
            return self.num_experts[0]
        assert self.num_layers is not None
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"num_layers={self.num_layers}, but there is a layer {layer}.")
        return self.num_experts[layer * len(self.num_experts) // self.num_layers]


class Mola(RoutedLora):
    """A (n, r, D), B (n, O, r), router (n, D)."""

    adapter_layer_names = ("mola_A", "mola_B", "mola_gate")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mola_A, self.mola_B, self.mola_gate = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

    def make(self, adapter: str, config: Any) -> None:
        base: Any = self.get_base_layer()
        layer = next((int(part) for part in self.layer_name.split(".") if part.isdecimal()), 0)
        number = config.experts_in(layer)
        self.mola_A[adapter] = low_rank(number, config.r, base.in_features)
        self.mola_B[adapter] = nn.Parameter(torch.zeros(number, base.out_features, config.r))
        self.mola_gate[adapter] = router_weight(number, base.in_features)

    def update(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        scores = F.linear(tokens, self.mola_gate[adapter]).softmax(-1)  # (N, n)
        weights, chosen = scores.topk(self.configs[adapter].top_k, dim=-1)
        weights = self.balanced(adapter, weights / weights.sum(-1, keepdim=True), scores, chosen)
        gates = torch.zeros_like(scores).scatter(1, chosen, weights)
        # low ranks are cheap: all experts' in one product, of which the gates keep the chosen
        hidden = F.linear(self.lora_dropout[adapter](tokens), self.mola_A[adapter].flatten(0, 1))  # (N, n r)
        weighted = hidden.unflatten(1, (scores.shape[1], -1)) * gates[:, :, None]
        return F.linear(weighted.flatten(1), self.mola_B[adapter].transpose(0, 1).flatten(1))


class MolaModel(RoutedLoraModel):
    """PEFT's tuner for `MolaConfig`."""

    prefix, tuner_layer_cls, layer_class = "mola_", Mola, Mola


register("mola", MolaConfig, MolaModel)
