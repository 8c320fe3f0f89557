"""SMoRA: each rank of one LoRA is an expert (https://arxiv.org/abs/2501.15103)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from transformers import TrainerCallback

from ..modeling.controllers import sign
from ..modeling.ops.recomputation import is_recomputed
from .peft_types import register
from .routed_lora import RoutedLora, RoutedLoraConfig, RoutedLoraModel, check_top_k, low_rank, router_weight


@dataclass
class SmoraConfig(RoutedLoraConfig):
    """`y = W x + s B diag(m(x)) A x`, where m chooses K of the r ranks; s = lora_alpha / r.

    `m_i = g_i` for the K ranks with the largest `(W_r x + b)_i`, 0 for the others; g is made of `W_r x` without b. The
    biases b are moved by `SmoraBalancing`, without a loss. From the abstract; that s divides by all ranks, so that
    K = r with gates of 1 is plain LoRA, is our choice.

    Args:
        r: all ranks; the paper has 64.
        top_k: K; the paper has 8.
        scoring: `softmax` over the chosen ranks, or `sigmoid` of each.
    """

    method: ClassVar[str] = "smora"

    r: int = field(default=64, metadata={"help": "All ranks."})
    lora_alpha: float = field(default=64, metadata={"help": "The update is multiplied by lora_alpha / r."})
    top_k: int = field(default=8, metadata={"help": "Ranks per token."})
    scoring: str = field(default="softmax", metadata={"help": "softmax over the chosen ranks, or sigmoid."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.top_k, self.r, "r")
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring={self.scoring!r} is unknown; choose 'softmax' or 'sigmoid'.")


class Smora(RoutedLora):
    """A (r, D), B (O, r), router (r, D) and its selection bias (r,), which no optimizer sees."""

    adapter_layer_names = ("smora_A", "smora_B", "smora_gate")
    other_param_names = (*RoutedLora.other_param_names, "smora_bias", "loads")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.smora_A, self.smora_B = nn.ParameterDict(), nn.ParameterDict()
        self.smora_gate, self.smora_bias = nn.ParameterDict(), BufferDict(persistent=True)
        self.loads: dict[str, torch.Tensor] = {}

    def make(self, adapter: str, config: Any) -> None:
        base: Any = self.get_base_layer()
        self.smora_A[adapter] = low_rank(config.r, base.in_features)
        self.smora_B[adapter] = nn.Parameter(torch.zeros(base.out_features, config.r))
        self.smora_gate[adapter] = router_weight(config.r, base.in_features)
        self.smora_bias[adapter] = torch.zeros(config.r)

    def update(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        gates = self.gates(adapter, tokens)
        hidden = F.linear(self.lora_dropout[adapter](tokens), self.smora_A[adapter]) * gates
        return F.linear(hidden, self.smora_B[adapter])

    def gates(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        """(N, r) m(x): 0 for ranks that are not chosen."""
        config = self.configs[adapter]
        logits = F.linear(tokens, self.smora_gate[adapter])
        sigmoid = config.scoring == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        bias: Any = self.smora_bias[adapter]
        chosen = (logits + bias).topk(config.top_k, dim=-1).indices
        self.count(adapter, chosen)
        weights = scores.gather(1, chosen) if sigmoid else logits.gather(1, chosen).softmax(-1)
        weights = self.balanced(adapter, weights, scores, chosen)
        return torch.zeros_like(scores).scatter(1, chosen, weights)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        bias: Any = self.smora_bias
        bias[adapter_name] = bias[adapter_name].float()  # steps of 0.001 are lost in 16 bits

    @torch.no_grad()
    def count(self, adapter: str, chosen: torch.Tensor) -> None:
        """Add the choices of real tokens to the loads of this optimizer step."""
        if not self.training or is_recomputed():
            return
        mask = self.rows.context.token_mask
        real = chosen[mask.to(chosen.device)] if mask is not None and len(mask) == len(chosen) else chosen
        loads = torch.bincount(real.flatten(), minlength=self.r[adapter]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        self.loads[adapter] = self.loads.get(adapter, 0) + loads

    @torch.no_grad()
    def move_biases(self, rate: float) -> None:
        """`b_i += u sign(mean(load) - load_i)`, and start counting anew."""
        for adapter, loads in self.loads.items():
            bias: Any = self.smora_bias[adapter]
            bias += sign(loads, rate).to(bias)
        self.loads = {}


class SmoraBalancing(TrainerCallback):
    """Moves SMoRA's selection biases once per optimizer step, by the tokens of all micro-batches and processes.

    Args:
        rate: u; 0.001 as in DeepSeek-V3.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        self.rate = rate

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not any(isinstance(module, Smora) for module in model.modules()):
            raise ValueError("This model has no SMoRA adapter whose ranks could be balanced.")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, Smora):
                module.move_biases(self.rate)


class SmoraModel(RoutedLoraModel):
    """PEFT's tuner for `SmoraConfig`."""

    prefix, tuner_layer_cls, layer_class = "smora_", Smora, Smora


register("smora", SmoraConfig, SmoraModel)
