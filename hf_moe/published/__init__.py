"""Public checkpoints that Transformers 5 cannot load any more, under their own type and names.

Importing them registers them.
"""

from ..modeling.host import register
from .bailing_moe import (
    BailingMoeConfig,
    BailingMoeForCausalLM,
    BailingMoeForSequenceClassification,
    BailingMoeForTokenClassification,
    BailingMoeModel,
)
from .deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekForTokenClassification,
    DeepseekModel,
)
from .plm import (
    PublishedPlmConfig,
    PublishedPlmForCausalLM,
    PublishedPlmForSequenceClassification,
    PublishedPlmForTokenClassification,
    PublishedPlmModel,
)

PUBLISHED = {  # model type -> config, decoder, causal language model, sequence classifier, token classifier
    "bailing_moe": (
        BailingMoeConfig,
        BailingMoeModel,
        BailingMoeForCausalLM,
        BailingMoeForSequenceClassification,
        BailingMoeForTokenClassification,
    ),
    "deepseek": (
        DeepseekConfig,
        DeepseekModel,
        DeepseekForCausalLM,
        DeepseekForSequenceClassification,
        DeepseekForTokenClassification,
    ),
}
AMBIGUOUS = {  # types whose names others use too: registered by `hf_moe.enable` only
    "plm": (
        PublishedPlmConfig,
        PublishedPlmModel,
        PublishedPlmForCausalLM,
        PublishedPlmForSequenceClassification,
        PublishedPlmForTokenClassification,
    ),
}

for classes in PUBLISHED.values():
    register(*classes)
del classes
