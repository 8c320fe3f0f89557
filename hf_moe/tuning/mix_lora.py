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
from .routed_lora import RowsTuner, check_linear, check_top_k, low_rank, router_weight, with_balance_loss

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class MixLoraConfig(LoraConfig):
    """Every dense feed-forward becomes a mixture of LoRA experts; attention gets plain LoRA in the same adapter.

    `y = sum_{i in top K} g_i FFN_i(x)`, where all three matrices of `FFN_i` are `W + s B_i A_i` within the
    non-linearity, and g the softmax of a router in float32 over the chosen experts (§3.1-3.2). The two first products
    with the frozen weights are computed once for all experts.

    Args:
        target_modules: names of the feed-forwards (`mlp`) and of linear layers elsewhere; a name that is a
            feed-forward with `gate_proj`, `up_proj`, `down_proj` and `act_fn` becomes a mixture. Default: all of them,
            and PEFT's linear layers for the model type.
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
    other_param_names = ("configs", "r", "scaling", "lora_dropout")

    def __init__(self, base_layer: nn.Module, name: str, rows: CurrentRows) -> None:
        super().__init__()
        for projection in PROJECTIONS:
            check_linear(getattr(base_layer, projection), f"{name}.{projection}")
        check_formula(base_layer, name)
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
        for projection in PROJECTIONS:
            base = self.projection(projection)
            a, b = self.matrices(projection)
            a[adapter] = low_rank(config.num_experts, config.r, base.in_features)
            b[adapter] = nn.Parameter(torch.zeros(config.num_experts, base.out_features, config.r))
        routers: Any = self.lora_router
        first = self.projection(PROJECTIONS[0])
        routers[adapter] = router_weight(config.num_experts, first.in_features, config.router_init_range)
        self._move_adapter_to_device_of_base_layer(adapter, first.weight.device)
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
        mixed = [self.mixture(adapter, x.flatten(0, -2)).view_as(x) for adapter in active]
        if len(mixed) == 1:
            return mixed[0]
        result = plain = self.base_layer(x)
        for mixture in mixed:
            result = result + (mixture - plain)
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
        output = torch.zeros_like(tokens, dtype=frozen[0].dtype)
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


def check_formula(feed_forward: Any, name: str) -> None:
    """Raise `ValueError` if a feed-forward computes something else than `down(act(gate x) * up x)`: multipliers of
    Falcon-H1, sparse activations of Gemma 3n."""
    weight = feed_forward.gate_proj.weight
    if weight.is_meta or not weight.numel():  # offloaded or sharded: there is nothing to try it with
        return
    x = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        hidden = feed_forward.act_fn(feed_forward.gate_proj(x)) * feed_forward.up_proj(x)
        expected, found = feed_forward(x), feed_forward.down_proj(hidden)
    if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise ValueError(
            f"{name!r} ({type(feed_forward).__name__}) does not compute down_proj(act_fn(gate_proj(x)) * up_proj(x)), "
            "which MixLoRA's experts do: leave it out of target_modules."
        )


class MixLoraModel(RowsTuner, LoraModel):
    """PEFT's LoRA, with `MixLora` for feed-forwards."""

    tuner_layer_cls = BaseTunerLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        chosen = peft_config.target_modules is not None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if not chosen:
            peft_config.target_modules |= set(feed_forwards(self.model))
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Before anything is replaced: a mixture, or a word on why not.

        Raises:
            ValueError: the targets hold no feed-forward, or one and parts of it.
        """
        super()._prepare_model(peft_config, model)
        possible = list(feed_forwards(model))
        mixtures = [name for name in possible if self._check_target_module_exists(peft_config, name)]
        if not mixtures:
            raise ValueError(
                f"target_modules={peft_config.target_modules} name no dense feed-forward, and this would be plain "
                f"LoRA: add some of {possible} or 'mlp'; for linear layers alone take MolaConfig."
            )
        parts = [f"{name}.{part}" for name in mixtures for part in PROJECTIONS]
        twice = [part for part in parts if self._check_target_module_exists(peft_config, part)]
        if twice:
            raise ValueError(f"target_modules name a feed-forward and parts of it, {twice}: leave out the parts.")

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
    """Names of the feed-forwards that MixLoRA can make a mixture of, or has; those of experts are not."""
    for name, module in model.named_modules():
        dense = all(hasattr(module, part) for part in (*PROJECTIONS, "act_fn")) and "expert" not in name
        if isinstance(module, MixLora) or (dense and not name.endswith(".base_layer")):
            yield name


register("mix_lora", MixLoraConfig, MixLoraModel)
