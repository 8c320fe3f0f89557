"""What we teach Transformers at import: one balance loss for every trainer, and our checkpoint layouts."""

from functools import wraps

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.models.mixtral import modeling_mixtral

from .configuration import DecoderConfig
from .experts import EXPERTS
from .losses import RouterLogits


def register_checkpoint_layout(config_class: type[DecoderConfig]) -> None:
    """Save the experts of a model type as one tensor per expert, the layout that vLLM, llama.cpp and mergekit read.

    In memory they are stacked; `from_pretrained` accepts both layouts, `save_pretrained(save_original_format=False)`
    writes the stacked one.
    """
    feed_forwards = [block["feed_forward"] for block in config_class().blocks.values()]
    kinds = [feed_forward["experts"]["type"] for feed_forward in feed_forwards if "experts" in feed_forward]
    converters = []
    for kind in kinds or EXPERTS:  # a free composition may hold any
        experts = EXPERTS[kind]
        for fused, names in experts.per_expert_names.items():
            path = f"mlp.{experts.attribute}"
            merge: list[ConversionOps] = [MergeModulelist(dim=0)]
            if len(names) > 1:
                merge.append(Concatenate(dim=1))
            sources = [f"{path}.*.{name}.weight" for name in names]
            converters.append(WeightConverter(sources, f"{path}.{fused}", merge))
    register_checkpoint_conversion_mapping(config_class.model_type, converters, overwrite=True)


def use_our_balance_loss() -> None:
    """Make Mixtral's `load_balancing_loss_func` return the loss of our models when it is given their router logits.

    TRL's trainers (1.16) skip `ForCausalLM.forward` and call this function on whatever MoE model they train. For every
    other model it is unchanged. To go when TRL asks the model for its auxiliary loss.
    """
    original = modeling_mixtral.load_balancing_loss_func
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def load_balancing_loss_func(gate_logits, *args, **kwargs) -> torch.Tensor | int:
        if isinstance(gate_logits, RouterLogits):
            if gate_logits.aux_loss is None:
                raise ValueError("These router logits lost their balance loss; train with `outputs.aux_loss` instead.")
            return gate_logits.aux_loss
        return original(gate_logits, *args, **kwargs)

    modeling_mixtral.load_balancing_loss_func = load_balancing_loss_func
