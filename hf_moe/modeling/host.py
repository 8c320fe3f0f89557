"""What we teach Transformers at import: our classes, our checkpoint layouts, one balance loss for every trainer."""

import re
from functools import wraps

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.mixtral import modeling_mixtral

from .code_files import CARRIED
from .configuration import DecoderConfig
from .experts import EXPERTS
from .model import (
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)

AUTO_HEADS = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)


def register(
    config_class: type[DecoderConfig],
    model_class: type[DecoderModel],
    causal_lm_class: type[DecoderPreTrainedModel],
    sequence_class: type[DecoderForSequenceClassification] | None = None,
    token_class: type[DecoderForTokenClassification] | None = None,
) -> None:
    """Make an architecture known to the Auto classes, the checkpoint loader and the trainers.

    Another package's classes for the same model type give way: whoever imports us wants ours.
    """
    heads = (causal_lm_class, sequence_class, token_class)
    CARRIED[config_class] = (config_class, model_class, *filter(None, heads))
    # The flat file of a repository is found by its `auto_map`. Registered, it would be taken for other repositories of
    # its type too, and it lacks the parts that only they use.
    if not __name__.startswith("transformers_modules."):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    for auto, head in zip(AUTO_HEADS, heads):
        if head is not None:
            auto.register(config_class, head, exist_ok=True)
    # Trainer's label smoothing shifts the labels of models named here only, and would teach ours to copy their input
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = causal_lm_class.__name__
    register_checkpoint_layout(config_class)
    use_our_balance_loss()


def register_checkpoint_layout(config_class: type[DecoderConfig]) -> None:
    """Save the experts of a model type as one tensor per expert, the layout that vLLM, llama.cpp and mergekit read.

    In memory they are stacked; `from_pretrained` accepts both layouts, `save_pretrained(save_original_format=False)`
    writes the stacked one. The same holds for names of layers in `config_class.published_names`.
    """
    feed_forwards = [block["feed_forward"] for block in config_class().blocks.values() if "feed_forward" in block]
    kinds = [feed_forward["experts"]["type"] for feed_forward in feed_forwards if "experts" in feed_forward]
    converters: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(re.escape(f".{theirs}"), re.escape(f".{ours}"))
        for theirs, ours in config_class.published_names.items()
    ]
    converters += config_class.published_converters()
    for kind in EXPERTS if "blocks" in config_class.__dataclass_fields__ else kinds:  # a free composition may hold any
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
        if hasattr(gate_logits, "aux_loss"):  # a flat single file has a RouterLogits of its own: no isinstance
            if gate_logits.aux_loss is None:
                raise ValueError("These router logits lost their balance loss; train with `outputs.aux_loss` instead.")
            return gate_logits.aux_loss
        return original(gate_logits, *args, **kwargs)

    modeling_mixtral.load_balancing_loss_func = load_balancing_loss_func
