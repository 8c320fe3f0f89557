"""hf_moe: mixtures of experts for Transformers.

Importing the package registers its architectures with the Auto classes; after that
`AutoModelForCausalLM.from_pretrained` loads them like any other model.
"""

from .architectures import (
    ARCHITECTURES,
    CLASSIFIERS,
    BamConfig,
    BamForCausalLM,
    BamForSequenceClassification,
    BamForTokenClassification,
    BamModel,
    BasedConfig,
    BasedForCausalLM,
    BasedForSequenceClassification,
    BasedForTokenClassification,
    BasedModel,
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    MoaConfig,
    MoaForCausalLM,
    MoaForSequenceClassification,
    MoaForTokenClassification,
    MoaModel,
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
    PlmConfig,
    PlmForCausalLM,
    PlmForSequenceClassification,
    PlmForTokenClassification,
    PlmModel,
    RMoeConfig,
    RMoeForCausalLM,
    RMoeForSequenceClassification,
    RMoeForTokenClassification,
    RMoeModel,
    SigmaConfig,
    SigmaForCausalLM,
    SigmaForSequenceClassification,
    SigmaForTokenClassification,
    SigmaModel,
    SwitchHeadConfig,
    SwitchHeadForCausalLM,
    SwitchHeadForSequenceClassification,
    SwitchHeadForTokenClassification,
    SwitchHeadModel,
)
from .modeling import (
    BLOCKS,
    EXPERTS,
    FEED_FORWARDS,
    MIXERS,
    ROUTERS,
    CacheMemory,
    MoeLayer,
    cache_memory,
    moe_layers,
    register,
)

__version__ = "0.1.0"

for model_type, (config_class, model_class, causal_lm_class) in ARCHITECTURES.items():
    register(config_class, model_class, causal_lm_class, *CLASSIFIERS[model_type])
del model_type, config_class, model_class, causal_lm_class
