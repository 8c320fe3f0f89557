"""Adapters for some of the stacked experts of a layer, at a cost that grows with their number.

The stack stays as it is and where it is. The base experts run with weight 0 for the (token, slot) pairs that adapted
experts get, and each adapted expert runs its own pairs with its own weights. Letters: N tokens, K chosen per token, E
experts, D width, F inner width, S adapted experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..modeling import moe_layers
from .replacing import StandsIn

FIRST = {True: "gate_up_proj", False: "up_proj"}  # whether there is a gate -> the first stack


class ExpertSubset(StandsIn):
    """Stands in for the experts of a layer; methods say what an adapted expert computes and how it is merged.

    Attributes:
        experts_of: name of an adapter -> the experts it adapts, ascending.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        check_experts(base_layer, name)
        self.base_layer, self.layer_name = base_layer, name
        self.experts_of: dict[str, list[int]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    @property
    def stacks(self) -> tuple[str, str]:
        """Names of the two stacked weights."""
        base: Any = self.get_base_layer()
        return FIRST[base.has_gate], "down_proj"

    def add_experts(self, adapter: str, experts: Sequence[int] | None) -> list[int]:
        """Note which experts an adapter adapts; None means all."""
        base: Any = self.get_base_layer()
        number: int = base.num_experts
        chosen = sorted(set(range(number) if experts is None else experts))
        if not chosen or chosen[0] < 0 or chosen[-1] >= number:
            raise ValueError(
                f"experts={list(experts or ())} of {self.layer_name!r} must be some of 0 to {number - 1}."
            )
        self.experts_of[adapter] = chosen
        return chosen

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> torch.Tensor:
        """(N, D) tokens, (N, K) chosen experts and weights -> (N, D), as Transformers' experts."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.experts_of]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights, *args, **kw)
        if args or kw:
            raise ValueError("Adapted experts take a table of choices, not a list of rows: use another router.")
        adapted = sorted({expert for name in active for expert in self.experts_of[name]})
        if len(adapted) == self.get_base_layer().num_experts:
            output = torch.zeros_like(hidden_states)
        else:
            known = torch.tensor(adapted, device=top_k_index.device)
            weights = top_k_weights.masked_fill(torch.isin(top_k_index, known), 0)
            output = self.base_layer(hidden_states, top_k_index, weights)
        for expert in adapted:  # one that no token chose runs on none, so that its gradient is 0 and not missing
            token, slot = torch.where(top_k_index == expert)
            result = self.run_expert(hidden_states[token], expert, active) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, result.to(output.dtype))
        return output

    def run_expert(self, tokens: torch.Tensor, expert: int, active: Sequence[str]) -> torch.Tensor:
        """One expert's feed-forward with its adapters on tokens (n, D)."""
        base: Any = self.get_base_layer()
        first, second = self.stacks
        hidden = self.linear(tokens, first, expert, active)
        return self.linear(base._apply_gate(hidden) if base.has_gate else base.act_fn(hidden), second, expert, active)

    def linear(self, x: torch.Tensor, stack: str, expert: int, active: Sequence[str]) -> torch.Tensor:
        """Multiply by one expert's adapted matrix of a stack."""
        raise NotImplementedError

    def base_linear(self, x: torch.Tensor, weight: torch.Tensor, stack: str, expert: int) -> torch.Tensor:
        """Multiply x by a matrix that is stored as those of the base, and add the base's bias."""
        base: Any = self.get_base_layer()
        bias = getattr(base, f"{stack}_bias")[expert] if base.has_bias else None
        return F.linear(x, weight.T if base.is_transposed else weight, bias)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the base's stacks; with `safe_merge`, only if the result is finite."""
        base: Any = self.get_base_layer()
        for adapter in adapter_names or self.active_adapters:
            if adapter not in self.experts_of or adapter in self.merged_adapters:
                continue
            new = {stack: list(self.merged_weights(adapter, stack)) for stack in self.stacks}
            if safe_merge and not all(w.isfinite().all() for pairs in new.values() for _, w in pairs):
                raise ValueError(f"NaN or infinite values in the merged weights of {self.layer_name!r}.")
            for stack, pairs in new.items():
                for expert, weight in pairs:
                    getattr(base, stack).data[expert] = weight
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out again."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for stack in self.stacks:
                for expert, weight in list(self.unmerged_weights(adapter, stack)):
                    getattr(base, stack).data[expert] = weight

    def merged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield every adapted expert and its merged matrix, stored as the base's."""
        raise NotImplementedError

    def unmerged_weights(self, adapter: str, stack: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield every adapted expert and the matrix it had before the merge."""
        raise NotImplementedError


def check_experts(experts: nn.Module, name: str) -> None:
    """Raise `ValueError` if single experts of a module cannot be adapted."""
    base: Any = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
    stacked = all(hasattr(base, fact) for fact in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if not stacked or getattr(base, "has_post_expert_norm", False):
        raise ValueError(
            f"The experts {name!r} ({type(base).__name__}) are not stacks of plain feed-forwards: single ones cannot "
            "be adapted. Choose experts='none', or PEFT's target_parameters."
        )
    if getattr(base, "_is_expert_parallel", False):
        raise ValueError(f"The experts {name!r} are spread over devices: adapt them without expert parallelism.")
    weight = getattr(base, FIRST[base.has_gate])
    if not weight.is_floating_point() or weight.dim() != 3 or weight.element_size() < 2:
        raise ValueError(
            f"The experts {name!r} are quantised ({weight.dtype}): load the base model in bfloat16, or adapt its "
            "attention only (experts='none')."
        )


def expert_modules(model: Any) -> dict[str, nn.Module]:
    """Name -> experts of every MoE layer, in order of depth; layers that share experts come once."""
    names = {module: name for name, module in model.named_modules()}
    return {names[layer.experts]: layer.experts for layer in moe_layers(model)}
