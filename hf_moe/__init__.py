"""hf_moe: mixtures of experts for Transformers.

Importing the package registers its architectures with the Auto classes; after that
`AutoModelForCausalLM.from_pretrained` loads them like any other model.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .architectures import (
    ARCHITECTURES,
    CLASSIFIERS,
    BamConfig,
    BamForCausalLM,
    BamForSequenceClassification,
    BamForTokenClassification,
    BamModel,
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
    RMoeConfig,
    RMoeForCausalLM,
    RMoeForSequenceClassification,
    RMoeForTokenClassification,
    RMoeModel,
)
from .modeling import (
    BLOCKS,
    EXPERTS,
    FEED_FORWARDS,
    MIXERS,
    ROUTERS,
    register_checkpoint_layout,
    use_our_balance_loss,
)

__version__ = "0.1.0"

use_our_balance_loss()
for model_type, (config_class, model_class, causal_lm_class) in ARCHITECTURES.items():
    sequence_class, token_class = CLASSIFIERS[model_type]
    AutoConfig.register(model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForCausalLM.register(config_class, causal_lm_class)
    AutoModelForSequenceClassification.register(config_class, sequence_class)
    AutoModelForTokenClassification.register(config_class, token_class)
    register_checkpoint_layout(config_class)
del model_type, config_class, model_class, causal_lm_class, sequence_class, token_class
