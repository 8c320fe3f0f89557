"""MixLoRA: LoRA experts of a whole feed-forward that share its frozen weights (https://arxiv.org/abs/2404.15159)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..modeling.router_calls import CurrentRows
from .peft_types import add_peft_type, register
from .replacing import adapt
from .routed_lora import check_linear, check_top_k, low_rank, router_weight, with_balance_loss

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class MixLoraConfig(LoraConfig):
    """Every dense feed-forward becomes a mixture of LoRA experts; attention gets plain LoRA in the same adapter.

    `y = sum_{i in top K} g_i FFN_i(x)`, where all three matrices of `FFN_i` are `W + s B_i A_i` within the
    non-linearity, and g the softmax of a router in float32 over the chosen experts (§3.1-3.2). The two first products
    with the frozen weights are computed once for all experts.

    Args:
        target_modules: names of the feed-forwards (`mlp`) and of linear layers elsewhere; a name that is a
            feed-forward with `gate_proj`, `up_proj`, `down_proj` and `act_fn` becomes a mixture.
        num_experts: n; the paper has 8.
        top_k: K; the paper has 2.
        router_aux_loss_coef: of Switch's balance loss, per feed-forward; the paper has 0.01.
        router_init_range: standard deviation of the routers' weights.
    """

    num_experts: int = field(default=8, metadata={"help": "LoRA experts per feed-forward."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Coefficient of the balance loss."})
    router_init_range: float = field(default=0.02, metadata={"help": "Standard deviation of the routers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("mix_lora")
        check_top_k(self.top_k, self.num_experts, "num_experts")
        if self.use_dora or self.lora_bias:
            raise ValueError("use_dora and lora_bias are not possible in MixLoRA; leave them out.")


class MixLora(nn.Module, BaseTunerLayer):
    """Stands in for a feed-forward: A (n, r, in) and B (n, out, r) for each projection, router (n, D)."""

    adapter_layer_names = (
        *(f"lora_{side}_{name}" for name in PROJECTIONS for side in "AB"),
        "lora_router",
    )
    other_param_names = ("r", "scaling", "lora_dropout")

    def __init__(self, base_layer: nn.Module, name: str, rows: CurrentRows) -> None:
        super().__init__()
        for projection in PROJECTIONS:
            check_linear(getattr(base_layer, projection), f"{name}.{projection}")
        self.base_layer, self.rows, self.loss_share = base_layer, rows, 1.0
        self.configs: dict[str, MixLoraConfig] = {}
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.lora_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter: str, config: MixLoraConfig) -> None:
        """Add an adapter that changes nothing yet."""
        self.configs[adapter], self.r[adapter] = config, config.r
        self.scaling[adapter] = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        width = 0
        for projection in PROJECTIONS:
            base = self.projection(projection)
            a, b = self.matrices(projection)
            a[adapter] = low_rank(config.num_experts, config.r, base.in_features)
            b[adapter] = nn.Parameter(torch.zeros(config.num_experts, base.out_features, config.r))
            width = width or base.in_features
        routers: Any = self.lora_router
        routers[adapter] = router_weight(config.num_experts, width, config.router_init_range)
        self.to(base.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def projection(self, name: str) -> Any:
        """A frozen linear layer of the feed-forward."""
        return getattr(self.get_base_layer(), name)

    def matrices(self, projection: str) -> tuple[Any, Any]:
        """A's and B's of a projection."""
        return getattr(self, f"lora_A_{projection}"), getattr(self, f"lora_B_{projection}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D); with several active adapters, their updates add up."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        result = self.base_layer(x)
        for adapter in active:
            tokens = x.flatten(0, -2)
            mixed = self.mixture(adapter, tokens).view_as(x).to(result.dtype)
            result = mixed if len(active) == 1 else result + (mixed - self.base_layer(x))
        return result

    def mixture(self, adapter: str, tokens: torch.Tensor) -> torch.Tensor:
        """(N, D) the weighted sum of the chosen experts."""
        config, base = self.configs[adapter], self.get_base_layer()
        routers: Any = self.lora_router
        logits = F.linear(tokens.float(), routers[adapter].float())
        top, chosen = logits.topk(config.top_k, dim=-1)
        coef = config.router_aux_loss_coef * self.loss_share if self.training else 0.0
        weights = with_balance_loss(top.softmax(-1), logits.softmax(-1), chosen, coef, self.rows)
        frozen = [self.projection(name)(tokens) for name in PROJECTIONS[:2]]
        output = torch.zeros_like(tokens)
        act: Any = base.act_fn
        for expert in range(config.num_experts):
            token, slot = torch.where(chosen == expert)
            rows = tokens[token]
            gate, up = (
                shared[token] + self.low_rank_update(adapter, name, expert, rows)
                for shared, name in zip(frozen, PROJECTIONS)
            )
            hidden = act(gate) * up
            result = self.projection("down_proj")(hidden) + self.low_rank_update(adapter, "down_proj", expert, hidden)
            output = output.index_add(0, token, (result * weights[token, slot, None]).to(output.dtype))
        return output

    def low_rank_update(self, adapter: str, projection: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """`s B_i A_i x`."""
        a, b = self.matrices(projection)
        down = F.linear(self.lora_dropout[adapter](x.to(a[adapter].dtype)), a[adapter][expert])
        return (self.scaling[adapter] * F.linear(down, b[adapter][expert])).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("MixLora chooses per token: it cannot be merged. Keep the adapter, or unload().")

    def unmerge(self) -> None:
        """Nothing was merged."""


class MixLoraModel(LoraModel):
    """PEFT's LoRA, with `MixLora` for feed-forwards."""

    tuner_layer_cls = BaseTunerLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        rows = CurrentRows()
        rows.follow(model)
        object.__setattr__(self, "rows", rows)  # before nn.Module's constructor, which PEFT's calls
        super().__init__(model, *args, **kwargs)

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
        if isinstance(target, MixLora) or all(hasattr(target, name) for name in (*PROJECTIONS, "act_fn")):
            make = partial(MixLora, name=current_key, rows=self.rows)
            adapt(self, make, MixLora, target, target_name, parent, adapter_name, lora_config)
        else:
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)


def feed_forwards(model: nn.Module) -> Iterator[str]:
    """Names of the feed-forwards that MixLoRA can make a mixture of; those of shared experts are not."""
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in (*PROJECTIONS, "act_fn")) and "shared_expert" not in name:
            yield name


register("mix_lora", MixLoraConfig, MixLoraModel)
