"""The one decoder that every architecture shares. Read this file first.

embed_tokens -> blocks (token mixer + feed-forward, chosen by the config) -> norm -> head. A router state may travel
from block to block beside the hidden states; balance losses come out of every block and are weighted here, once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .blocks import BLOCKS, Block
from .code_files import ModelWithCode
from .configuration import DecoderConfig
from .context import ForwardContext
from .generation import PartsGenerationMixin
from .layers import RMSNorm, RotaryEmbedding
from .losses import RouterLogits, share_of_labels, weighted_losses
from .mixers import Mixer
from .ops.soft_cap import soft_cap
from .packing import find_segments, layer_masks, mask_for_flash, padding_mask, positions_of
from .parts import Part, build, fp32_buffers
from .routers import Router


@dataclass
class DecoderOutput(MoeModelOutputWithPast):
    """Transformers' MoE decoder output, and the balance losses of this forward pass.

    Args:
        router_losses: (3,) balance loss, z-loss, the routers' own, each summed over the layers; None if nobody asked.
        aux_loss: scalar; what has to be multiplied by `router_aux_loss_coef` and added to the loss.
    """

    router_losses: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        # the capturing hooks deliver plain tuples; TRL needs the loss to travel with the logits
        super().__setitem__(key, RouterLogits(value, self.aux_loss) if key == "router_logits" else value)


class DecoderPreTrainedModel(ModelWithCode, PreTrainedModel):
    """What Transformers must know about all our models."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    model_tags = ["hf_moe", "mixture-of-experts"]  # of the card that push_to_hub writes
    supports_gradient_checkpointing = True
    _no_split_modules = [block.__name__ for block in BLOCKS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(Block, index=0),
        "attentions": OutputRecorder(Mixer, index=1),
        "router_logits": OutputRecorder(Router, index=0, layer_name="mlp.gate"),
    }

    # Transformers looks for these two in the text of the file that defines the model; ours come from parts.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.init_weights(self.config.initializer_range)


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        blocks = [(config.block(number), layer_idx) for number, layer_idx in enumerate(config.block_starts)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(build(BLOCKS, spec, config, layer_idx) for spec, layer_idx in blocks)
        # one object over the depth, held here so that sharding and adapters see each parameter once
        self.shared = nn.ModuleDict(config.shared_modules())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)  # pyright: ignore[reportArgumentType] - annotated with Llama's config
        self.gradient_checkpointing = False
        self._keep_in_fp32_modules_strict = fp32_buffers(self)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Arguments as in every Transformers decoder. `attention_mask` may be a dict of ready masks per layer type."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        masks, inputs = self.layer_inputs(
            inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, **kwargs
        )
        hidden_states, router_state, all_losses = inputs_embeds, None, []
        for layer, mask in zip(self.layers, masks):
            hidden_states, router_state, losses = layer(hidden_states, router_state, attention_mask=mask, **inputs)
            if losses is not None:
                all_losses.append(losses.to(inputs_embeds.device))
        router_losses = torch.stack(all_losses).sum(0) if all_losses else None
        return DecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=inputs["past_key_values"],
            router_losses=router_losses,
            aux_loss=self.aux_loss(router_losses, inputs_embeds),
        )

    def layer_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> tuple[list[Any], dict[str, Any]]:
        """The mask of each block, and what all of them receive besides."""
        segments = find_segments(inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs)
        if position_ids is None:
            position_ids = positions_of(segments, inputs_embeds, past_key_values)
        if segments is not None and "flash" in (self.config._attn_implementation or ""):
            attention_mask = mask_for_flash(attention_mask, segments, "cu_seq_lens_q" in kwargs)
        masks = layer_masks(self.config, attention_mask, inputs_embeds, past_key_values, position_ids, segments)
        if use_cache and past_key_values is None and segments is None:  # packed rows cannot be continued
            past_key_values = DynamicCache(config=self.config)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        token_mask = padding_mask(attention_mask, inputs_embeds.shape[1])  # None where there is a mask per layer type
        context = ForwardContext(
            self.shared,
            None if token_mask is None else token_mask.flatten(),
            self.training or bool(output_router_logits),
            segments,
            (inputs_embeds.shape[0], inputs_embeds.shape[1]),
            self.config.router_balance_loss,
            kwargs,
        )
        shared = {"context": context, "position_ids": position_ids, "past_key_values": past_key_values}
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        layer_types = self.config.layer_types
        return (
            [masks[layer_types[layer_idx]] for layer_idx in self.config.block_starts],
            {**kwargs, **shared, "position_embeddings": position_embeddings},
        )

    def aux_loss(self, router_losses: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """The scalar that `router_aux_loss_coef` multiplies: all losses, at their ratio to the balance loss."""
        coef = self.config.router_aux_loss_coef
        if router_losses is None:
            return like.new_zeros((), dtype=torch.float32)
        return weighted_losses(router_losses, self.config) / coef if coef else router_losses[0]


class DecoderForCausalLM(DecoderPreTrainedModel, PartsGenerationMixin):
    """Decoder with a language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    model_class: type[DecoderModel] = DecoderModel

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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

        In training, `loss` holds cross-entropy plus the balance loss of every MoE layer, weighted by
        `router_aux_loss_coef` and by this micro-batch's share of the step's label tokens (`num_items_in_batch`), so
        that accumulation and data parallelism do not change the coefficient. In evaluation it is cross-entropy alone.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **inputs,
        )
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if self.training:
                inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
                loss = loss + self.added_loss(outputs, labels, **inputs).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss if outputs.router_losses is not None else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the head says about (B, T, D) hidden states behind the final norm."""
        return soft_cap(self.lm_head(hidden_states), self.config.final_logit_softcapping)

    def added_loss(
        self,
        outputs: DecoderOutput,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What training adds to the cross-entropy of one micro-batch: here the weighted balance losses.

        Subclasses may add losses of their own; `kwargs` holds all inputs of the model.
        """
        if outputs.router_losses is None:
            return labels.new_zeros((), dtype=torch.float32)
        share = share_of_labels(labels, num_items_in_batch, shift_labels)
        return weighted_losses(outputs.router_losses, self.config) * share


class DecoderForSequenceClassification(GenericForSequenceClassification, DecoderPreTrainedModel):
    """Decoder with a sequence-classification head on the last token."""


class DecoderForTokenClassification(GenericForTokenClassification, DecoderPreTrainedModel):
    """Decoder with a token-classification head."""


def model_classes(
    prefix: str, config_class: type[DecoderConfig], causal_lm_class: type[DecoderForCausalLM] = DecoderForCausalLM
) -> tuple[
    type[DecoderModel],
    type[DecoderForCausalLM],
    type[DecoderForSequenceClassification],
    type[DecoderForTokenClassification],
]:
    """The classes of a named architecture, e.g. `BamModel` and `BamForCausalLM` for the prefix `Bam`.

    They differ from the decoder's in their config only, but Transformers wants one class per config and head. Another
    `causal_lm_class` is one that trains differently.
    """

    def subclass(base: Any, head: str, **attributes: Any) -> Any:
        name = prefix + head
        members = {"config_class": config_class, "__module__": config_class.__module__, "__doc__": base.__doc__}
        return type(name, (base,), {**members, **attributes})

    model = subclass(DecoderModel, "Model")
    return (
        model,
        subclass(causal_lm_class, "ForCausalLM", model_class=model),
        subclass(DecoderForSequenceClassification, "ForSequenceClassification"),
        subclass(DecoderForTokenClassification, "ForTokenClassification"),
    )
