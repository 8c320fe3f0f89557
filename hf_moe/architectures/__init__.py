"""Published architectures: each file spells one paper in terms of parts."""

from .bam import (
    BamConfig,
    BamForCausalLM,
    BamForSequenceClassification,
    BamForTokenClassification,
    BamModel,
)
from .hf_moe import (
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)
from .mole import (
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
)
from .rmoe import (
    RMoeConfig,
    RMoeForCausalLM,
    RMoeForSequenceClassification,
    RMoeForTokenClassification,
    RMoeModel,
)

ARCHITECTURES = {  # model_type -> (config, decoder, causal language model)
    "hf_moe": (HfMoeConfig, HfMoeModel, HfMoeForCausalLM),
    "bam": (BamConfig, BamModel, BamForCausalLM),
    "rmoe": (RMoeConfig, RMoeModel, RMoeForCausalLM),
    "mole": (MoleConfig, MoleModel, MoleForCausalLM),
}

CLASSIFIERS = {  # model_type -> (sequence classifier, token classifier)
    "hf_moe": (HfMoeForSequenceClassification, HfMoeForTokenClassification),
    "bam": (BamForSequenceClassification, BamForTokenClassification),
    "rmoe": (RMoeForSequenceClassification, RMoeForTokenClassification),
    "mole": (MoleForSequenceClassification, MoleForTokenClassification),
}
