"""THOR: experts drawn at random, which learn to agree (https://arxiv.org/abs/2110.04260).

The paper trains encoder-decoders for translation. This is its layer and its loss in a decoder with RMSNorm and rotary
positions.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..modeling.configuration import DecoderConfig
from ..modeling.divergence import divergence
from ..modeling.model import DecoderForCausalLM, model_classes


@strict
class ThorConfig(DecoderConfig):
    """Stochastic experts in every second layer, from the first. Defaults are the released IWSLT'14 script's decoder
    (fairseq's `transformer_iwslt_de_en`, here without attention to an encoder).

    Args:
        num_experts: experts of a sparse layer; a dense layer has one of the same width.
        intermediate_size: width of one expert, which has no gate but biases.
        expert_inference: outside training, draw an expert for each `token` (the released default) or `sequence`, or
            average `all`. With draws, no two calls are the same.
        consistency_loss_coef: alpha, the weight of the consistency loss; 5 in the script, 1 in its code's default.
    """

    model_type = "thor"
    block_pattern: ClassVar[tuple[str, ...]] = ("stochastic", "dense")

    vocab_size: int = 10152
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_experts: int = 2
    intermediate_size: int = 1024
    hidden_act: str = "relu"
    expert_inference: str = "token"
    consistency_loss_coef: float | int = 5.0
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        layer = {"intermediate_size": self.intermediate_size, "activation": self.hidden_act, "bias": True}
        experts = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": {"type": "random", "inference": self.expert_inference},
            "experts": {"type": "mlp", **layer},
        }
        block = {"type": "pre_norm", "mixer": {"type": "attention"}}
        return {
            "stochastic": {**block, "feed_forward": experts},
            "dense": {**block, "feed_forward": {"type": "ungated_mlp", **layer}},
        }


ThorModel, _, ThorForSequenceClassification, ThorForTokenClassification = model_classes("Thor", ThorConfig)


class ThorForCausalLM(DecoderForCausalLM):
    """Decoder with a language-modeling head, which in training runs twice, each pass with draws of its own."""

    config_class = ThorConfig
    model_class = ThorModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Arguments as in every Transformers causal language model.

        In training with labels, `loss` is the sum of both passes' losses and `consistency_loss_coef` times their
        divergence, about twice the cross-entropy; everything else is the first pass's. Otherwise there is one pass.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_router_logits": output_router_logits,
            "logits_to_keep": logits_to_keep,
            **kwargs,
            "return_dict": True,
        }
        if labels is None or not self.training:
            return super().forward(**inputs)
        if past_key_values is not None:
            raise ValueError("A second pass would write the tokens into past_key_values again; train without a cache.")
        outputs, second = super().forward(**inputs), super().forward(**inputs)
        assert outputs.logits is not None and second.logits is not None
        assert outputs.loss is not None and second.loss is not None
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        counted = shifted.to(second.logits.device) != -100
        # the released code sums over tokens, as with the cross-entropy, and divides both by their number at the step
        items = kwargs.get("num_items_in_batch")
        consistency = divergence("symmetric_kl", outputs.logits, second.logits, counted, items)
        outputs.loss = outputs.loss + second.loss + self.config.consistency_loss_coef * consistency
        return outputs
