"""Time-MoE as published: type `time_moe`, numbers in and forecasts out, whose code for Transformers 4 no longer runs
(https://arxiv.org/abs/2409.16040).

Maple728/TimeMoE-{50M,200M}: fields and saved names are those of its config.json and safetensors files.

Letters: B rows, T points, C channels (1 in the released models), D width, h horizon.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.generic import can_return_tuple

from ..modeling.configuration import DecoderConfig
from ..modeling.forecasting import ForecastingMixin, forecast_loss
from ..modeling.model import DecoderModel, DecoderPreTrainedModel


@strict
class TimeMoeConfig(DecoderConfig):
    """Defaults are TimeMoE-50M.

    Args:
        input_size: channels C of a point.
        intermediate_size: width of the shared expert; a routed one has `intermediate_size / num_experts_per_tok`.
        num_experts: routed experts of a layer.
        num_experts_per_tok: experts of a point; their weights are their softmax scores, not renormalised.
        horizon_lengths: how many points each head forecasts at once, ascending.
        use_dense: a plain SwiGLU of `intermediate_size` in place of every mixture.
        apply_aux_loss: balance the experts in training.
        router_aux_loss_factor: weight of the balance loss.

    Raises:
        ValueError: horizons that do not ascend from at least 1, a width that the chosen experts cannot share.
    """

    model_type = "time_moe"
    block_pattern: ClassVar[tuple[str, ...]] = ("time_moe",)
    published_names: ClassVar[dict[str, str]] = {"ffn_layer.": "mlp."}

    vocab_size: int = 1  # points are numbers
    input_size: int = 1
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_experts: int = 8
    num_experts_per_tok: int = 2
    horizon_lengths: list[int] | int | tuple[int, ...] = (1, 8, 32, 64)
    use_dense: bool = False
    apply_aux_loss: bool = True
    router_aux_loss_factor: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        horizons = self.horizon_lengths
        self.horizon_lengths = [horizons] if isinstance(horizons, int) else list(horizons)  # as JSON has it
        super().__post_init__(**kwargs)

    @classmethod
    def published_converters(cls) -> list[Any]:
        """The name of the embedding of points."""
        return [WeightRenaming("embed_layer", "embed_tokens")]

    def validate_parts(self) -> None:
        horizons = self.horizon_lengths
        assert isinstance(horizons, list)
        if not horizons or horizons[0] < 1 or sorted(set(horizons)) != horizons:
            raise ValueError(f"horizon_lengths={horizons} must ascend from at least 1, like [1, 8, 32, 64].")
        if self.intermediate_size % self.num_experts_per_tok:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} is shared by the num_experts_per_tok="
                f"{self.num_experts_per_tok} experts of a point and must be a multiple of it."
            )
        super().validate_parts()

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        width = self.intermediate_size
        mixture = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "top_k", "top_k": self.num_experts_per_tok, "normalize": False},
            "experts": {"type": "swiglu", "intermediate_size": width // self.num_experts_per_tok},
            "shared_intermediate_size": width,
            "shared_gate": True,
        }
        feed_forward = {"type": "mlp", "intermediate_size": width} if self.use_dense else mixture
        mixer = {"type": "attention", "qkv_bias": True}
        return {"time_moe": {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward}}


class PointEmbedding(nn.Module):
    """`silu(W_gate x) * W_emb x` of each point (https://arxiv.org/abs/2409.16040, eq. 1)."""

    def __init__(self, config: TimeMoeConfig) -> None:
        super().__init__()
        self.emb_layer = nn.Linear(config.input_size, config.hidden_size, bias=False)
        self.gate_layer = nn.Linear(config.input_size, config.hidden_size, bias=False)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Points (B, T) or (B, T, C) -> (B, T, D)."""
        points = points.unsqueeze(-1) if points.ndim == 2 else points
        points = points.to(self.emb_layer.weight.dtype)
        return F.silu(self.gate_layer(points)) * self.emb_layer(points)


class TimeMoeModel(DecoderModel):
    """The decoder over points; `input_ids` are their values."""

    config_class = TimeMoeConfig

    def __init__(self, config: TimeMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = PointEmbedding(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()


class TimeMoeForPrediction(ForecastingMixin, DecoderPreTrainedModel):
    """Decoder with one linear head per horizon: h forecasts for every point."""

    config_class = TimeMoeConfig
    accepts_loss_kwargs = False  # the loss is a mean over points: Trainer averages micro-batches itself

    def __init__(self, config: TimeMoeConfig) -> None:
        super().__init__(config)
        self.model = TimeMoeModel(config)
        widths = [config.input_size * horizon for horizon in self.horizons]
        heads = [nn.Linear(config.hidden_size, width, bias=False) for width in widths]
        self.lm_heads = nn.ModuleList(nn.ModuleDict({"out_layer": head}) for head in heads)
        self.post_init()

    @property
    def horizons(self) -> Sequence[int]:
        """How many points each head forecasts, ascending."""
        return self.config.horizon_lengths

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_masks: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        max_horizon_length: int | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Forecasts after every point.

        Args:
            input_ids: (B, T) or (B, T, C) values, normalised by the caller.
            labels: like `input_ids`, shifted already as in the published data: `labels[:, t]` is the point after
                `input_ids[:, t]`.
            loss_masks: like `labels`, 1 where a label counts.
            max_horizon_length: without labels, use the head with the largest horizon up to this, or the first one cut
                off; None means the first head.

        Returns:
            `logits` (B, T, C h): with labels those of the first head. `loss` is the mean over the heads of
            `forecast_loss`, and in training `router_aux_loss_factor` times Mixtral's balance loss over all layers.
        """
        balanced = labels is not None and self.training and self.config.apply_aux_loss and not self.config.use_dense
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=balanced or output_router_logits,
            **kwargs,
        )
        hidden, loss, aux_loss = outputs.last_hidden_state, None, None
        if labels is None:
            forecasts = self.head_for(hidden, max_horizon_length)
        else:
            heads = [head["out_layer"](hidden) for head in self.lm_heads]  # pyright: ignore[reportIndexIssue]
            losses = [forecast_loss(head, labels, h, loss_masks) for head, h in zip(heads, self.horizons)]
            forecasts, loss = heads[0], torch.stack(losses).mean()
        if balanced and loss is not None:
            aux_loss = self.balance_loss(outputs.router_logits, attention_mask)
            loss = loss + self.config.router_aux_loss_factor * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=forecasts,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def balance_loss(
        self, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mixtral's loss, which the published code took over: over the points of all layers together, k times that of
        the paper's formula. `tuple` takes off what would turn it into the decoder's own."""
        experts, top_k = self.config.num_experts, self.config.num_experts_per_tok
        loss = load_balancing_loss_func(tuple(router_logits), experts, top_k, attention_mask)  # pyright: ignore[reportArgumentType]
        assert isinstance(loss, torch.Tensor)
        return loss

    def head_for(self, hidden: torch.Tensor, longest: int | None) -> torch.Tensor:
        """What the head says that forecasts the most points up to `longest`."""
        fitting = [number for number, horizon in enumerate(self.horizons) if longest is None or horizon <= longest]
        number = fitting[-1] if fitting and longest is not None else 0
        forecasts = self.lm_heads[number]["out_layer"](hidden)  # pyright: ignore[reportIndexIssue]
        return forecasts if longest is None else forecasts[..., : self.config.input_size * longest]
