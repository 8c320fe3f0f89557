"""Public checkpoints under their own type and names, that Transformers 5 cannot load any more."""

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
}
