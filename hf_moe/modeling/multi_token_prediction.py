"""Multi-token prediction: layers behind the last one that learn to predict the tokens after the next.

DeepSeek-V3 (https://arxiv.org/abs/2412.19437, §2.2), in the order of Ling 2.0's code. Layer k = 1 ... depth reads, at
position t, the embedding of token x_{t+k} and the hidden state that predicted it, and predicts x_{t+k+1}:

    h^k_t = norm(block(W [norm_e(E x_{t+k}), norm_h(h^{k-1}_t)])),   h^0 the trunk behind its final norm
    loss = CE(head(h^0), x_{t+1}) + weight / depth sum_k CE(head(h^k), x_{t+k+1})

Embedding and head are the trunk's. Letters: B batch, T time, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn

from .blocks import BLOCKS
from .configuration import DecoderConfig
from .context import ForwardContext
from .layers import RMSNorm
from .losses import share_of_labels, weighted_losses
from .model import DecoderForCausalLM, DecoderOutput
from .parts import build, fp32_buffers


@strict
class MultiTokenConfig(DecoderConfig):
    """A config whose model may predict several tokens in training.

    Args:
        num_nextn_predict_layers: layers that each predict one token more; 0 for none. They are not among the
            `num_hidden_layers`, and are blocks like the last one of the trunk.
        mtp_loss_scaling_factor: weight of the mean of their losses. DeepSeek-V3 begins with 0.3, Ling 2.0 has 0.1.
            (Ling's code would add, not average, the losses of several layers; with one there is no difference.)
    """

    num_nextn_predict_layers: int = 1
    mtp_loss_scaling_factor: float | int = 0.1

    def validate_parts(self) -> None:
        super().validate_parts()
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 (for none) or more.")


class PredictionLayer(nn.Module):
    """One step further into the future. Names are those of DeepSeek's and Ling's checkpoints."""

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.mtp_block = build(BLOCKS, last_block(config), config, config.block_starts[-1])  # as deep as the last one
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeddings: torch.Tensor, hidden_states: torch.Tensor, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of the tokens after those that `hidden_states` saw, both (B, T, D) -> the next hidden states."""
        joint = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden_states)], -1))
        output, _, losses = self.mtp_block(joint, None, **inputs)
        return self.final_layernorm(output), losses


class PredictionLayers(nn.ModuleList):
    """All steps into the future, with the plans by which Transformers shards them."""

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__(PredictionLayer(config) for _ in range(config.num_nextn_predict_layers))
        self._tp_plan, self._ep_plan = (
            config.plan(name, [last_block(config)], "*.mtp_block") for name in ("tp_plan", "ep_plan")
        )


def last_block(config: DecoderConfig) -> dict[str, Any]:
    """The spec of the trunk's last block."""
    return config.block(len(config.block_starts) - 1)


class MultiTokenForCausalLM(DecoderForCausalLM):
    """Decoder with a language-modeling head that, in training with `labels`, also predicts tokens after the next.

    Evaluation and generation do without the further layers. Trainers that compute the loss from hidden states
    themselves (TRL with `use_liger_kernel` or chunked losses) leave this loss out.
    """

    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # a checkpoint may have them, a config of 0 layers not want them
    config: MultiTokenConfig

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__(config)
        self.mtp = PredictionLayers(config)
        self._keep_in_fp32_modules_strict = fp32_buffers(self)
        self.post_init()

    def added_loss(
        self,
        outputs: DecoderOutput,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        loss = super().added_loss(outputs, labels, num_items_in_batch, shift_labels)
        if not len(self.mtp):
            return loss
        hidden_states = outputs.last_hidden_state
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        masks, inputs = self.model.layer_inputs(embeddings, **kwargs)
        follows = is_followed(inputs["context"], embeddings)
        targets = F.pad(labels[..., 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        targets = targets.masked_fill(~follows, -100)
        weight = self.config.mtp_loss_scaling_factor / len(self.mtp)
        for layer in self.mtp:
            embeddings, targets = advance(embeddings, follows, 0), advance(targets, follows, -100)
            hidden_states, losses = layer(embeddings, hidden_states, attention_mask=masks[-1], **inputs)
            loss = loss + weight * self.prediction_loss(hidden_states, targets, num_items_in_batch)
            if losses is not None:
                loss = loss + weighted_losses(losses, self.config) * share_of_labels(
                    labels, num_items_in_batch, shift_labels
                )
        return loss

    def prediction_loss(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross-entropy of one layer: a mean over its targets, or their sum by the label tokens of the whole step."""
        if num_items_in_batch is None:  # there may be none: a row of two tokens has a next one only
            num_items_in_batch = (targets != -100).sum().clamp(min=1)
        logits = self.logits(hidden_states)
        return self.loss_function(
            logits, targets, self.vocab_size, num_items_in_batch=num_items_in_batch, shift_labels=targets.contiguous()
        )


def is_followed(context: ForwardContext, like: torch.Tensor) -> torch.Tensor:
    """(B, T) whether the next column holds a real token of the same sequence."""
    batch, time = like.shape[:2]
    follows = torch.ones(batch, time - 1, dtype=torch.bool, device=like.device)
    if context.segments is not None:
        follows = follows & (context.segments.diff(dim=1) == 0)
    if context.token_mask is not None:
        real = context.token_mask.view(batch, time)
        follows = follows & real[:, 1:] & real[:, :-1]
    return F.pad(follows, (0, 1), value=False)


def advance(values: torch.Tensor, follows: torch.Tensor, fill: int) -> torch.Tensor:
    """What stands in the next column (B, T, ...), and `fill` where the sequence ends."""
    ends = ~follows.view(*follows.shape, *[1] * (values.ndim - 2))
    return values.roll(-1, 1).masked_fill(ends, fill)
