"""Public checkpoints that Transformers 5 cannot load any more, under their own type and names.

Importing them registers them.
"""

from typing import Any

from ..modeling.host import register
from .bailing_moe import (
    BailingMoeConfig,
    BailingMoeForCausalLM,
    BailingMoeForSequenceClassification,
    BailingMoeForTokenClassification,
    BailingMoeModel,
)
from .bailing_moe_linear import (
    BailingMoeLinearV2Config,
    BailingMoeLinearV2ForCausalLM,
    BailingMoeLinearV2ForSequenceClassification,
    BailingMoeLinearV2ForTokenClassification,
    BailingMoeLinearV2Model,
)
from .deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekForTokenClassification,
    DeepseekModel,
)
from .llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    LlamaMoEForSequenceClassification,
    LlamaMoEForTokenClassification,
    LlamaMoEModel,
)
from .pangu_pro_moe import (
    PanguProMoEConfig,
    PanguProMoEForCausalLM,
    PanguProMoEForSequenceClassification,
    PanguProMoEForTokenClassification,
    PanguProMoEModel,
)
from .plm import (
    PublishedPlmConfig,
    PublishedPlmForCausalLM,
    PublishedPlmForSequenceClassification,
    PublishedPlmForTokenClassification,
    PublishedPlmModel,
)
from .time_moe import TimeMoeConfig, TimeMoeForPrediction, TimeMoeModel

# model type -> config, decoder, causal model, and where it has them sequence classifier and token classifier
PUBLISHED: dict[str, tuple[Any, ...]] = {
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
    "llama_moe": (
        LlamaMoEConfig,
        LlamaMoEModel,
        LlamaMoEForCausalLM,
        LlamaMoEForSequenceClassification,
        LlamaMoEForTokenClassification,
    ),
    "PanguProMoE": (
        PanguProMoEConfig,
        PanguProMoEModel,
        PanguProMoEForCausalLM,
        PanguProMoEForSequenceClassification,
        PanguProMoEForTokenClassification,
    ),
    "bailing_moe_linear": (
        BailingMoeLinearV2Config,
        BailingMoeLinearV2Model,
        BailingMoeLinearV2ForCausalLM,
        BailingMoeLinearV2ForSequenceClassification,
        BailingMoeLinearV2ForTokenClassification,
    ),
    "time_moe": (TimeMoeConfig, TimeMoeModel, TimeMoeForPrediction),
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
