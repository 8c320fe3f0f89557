"""Public checkpoints under their own type and names, that Transformers 5 cannot load any more."""

from .deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekForTokenClassification,
    DeepseekModel,
)

PUBLISHED = {  # model type -> config, decoder, causal language model, sequence classifier, token classifier
    "deepseek": (
        DeepseekConfig,
        DeepseekModel,
        DeepseekForCausalLM,
        DeepseekForSequenceClassification,
        DeepseekForTokenClassification,
    ),
}
