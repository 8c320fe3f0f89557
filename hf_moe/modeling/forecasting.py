"""Forecasting with a decoder over points: the loss of several horizons, and `generate` that appends their forecasts.

Letters: B rows, T points, C channels, h horizon.
"""

from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

SLOW = 64  # steps from which a progress bar is worth its line


def windows(values: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, T, h, C) the next h entries from each of (B, T) or (B, T, C) on; zeros behind the end."""
    values = values.unsqueeze(-1) if values.ndim == 2 else values
    return F.pad(values, (0, 0, 0, horizon - 1)).unfold(1, horizon, 1).transpose(-1, -2)


def forecast_loss(
    forecasts: torch.Tensor,
    labels: torch.Tensor,
    horizon: int,
    masks: torch.Tensor | None = None,
    delta: float = 2.0,
) -> torch.Tensor:
    """Mean Huber loss of one head (https://arxiv.org/abs/2409.16040, §3.2.3).

    Args:
        forecasts: (B, T, h C); entry (t, i) is for the point i + 1 after t.
        labels: (B, T) or (B, T, C); `labels[:, t]` is the point after t. Without masks, forecasts of points behind the
            end are compared with 0, as in the published code.
        masks: like `labels`, 1 where a label counts; behind the end none does.
        delta: where the loss turns from a parabola into a line.
    """
    targets = windows(labels, horizon).to(forecasts)
    losses = F.huber_loss(forecasts.view(targets.shape), targets, reduction="none", delta=delta)
    if masks is None:
        return losses.mean()
    counted = windows(masks, horizon).to(losses).expand_as(losses)
    return (losses * counted).sum() / counted.sum()


class ForecastingMixin:
    """`generate` for models whose `forward` takes `max_horizon_length` and forecasts in `logits` (B, T, C h)."""

    config: Any

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: torch.Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast points one after the other, as many at once as the horizons allow (greedy, as published).

        Args:
            inputs: (B, T) or (B, T, C) values, normalised by the caller; also as `input_ids`.
            max_new_tokens: how many points to forecast.
            max_length: the length of the result instead.
            attention_mask: (B, T) 0 for padding on the left.
            use_cache: keep keys and values, instead of computing them again for every step.

        Returns:
            (B, T + new) or (B, T + new, C): the inputs and the forecasts.

        Raises:
            ValueError: no inputs, no length or both, padding on the right.
        """
        points = inputs if inputs is not None else input_ids
        length = checked_length(points, max_new_tokens, max_length, attention_mask)
        assert points is not None
        points, cache, seen = points.to(self.device), None, 0
        mask = None if attention_mask is None else attention_mask.to(self.device)
        bar = tqdm(total=length - points.shape[1], unit="points", disable=length - points.shape[1] < SLOW)
        while points.shape[1] < length:
            output = self(
                input_ids=points[:, seen:],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=use_cache,
                max_horizon_length=length - points.shape[1],
            )
            if use_cache:
                cache, seen = output.past_key_values, points.shape[1]
            new = output.logits[:, -1].unflatten(-1, (-1, self.config.input_size)).to(points)
            points = torch.cat([points, new.reshape(points.shape[0], -1, *points.shape[2:])], 1)
            if mask is not None:
                mask = F.pad(mask, (0, new.shape[1]), value=1)
            bar.update(new.shape[1])
        bar.close()
        return points


def checked_length(points: torch.Tensor | None, new: int | None, length: int | None, mask: torch.Tensor | None) -> int:
    """The length of the result; refuses what cannot be forecast."""
    if points is None or points.ndim not in (2, 3) or not points.is_floating_point():
        raise ValueError("generate needs floating-point values of shape (rows, points) or (rows, points, channels).")
    if (new is None) == (length is None):
        raise ValueError("say how many points to forecast: max_new_tokens, or max_length with the inputs counted.")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("attention_mask ends with padding: pad on the left, so that forecasts follow the last point.")
    return points.shape[1] + new if new is not None else length or 0
