"""Published architectures: each file spells one paper in terms of parts."""

from .bam import (
    BamConfig,
    BamForCausalLM,
    BamForSequenceClassification,
    BamForTokenClassification,
    BamModel,
)
from .based import (
    BasedConfig,
    BasedForCausalLM,
    BasedForSequenceClassification,
    BasedForTokenClassification,
    BasedModel,
)
from .hf_moe import (
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)
from .moa import (
    MoaConfig,
    MoaForCausalLM,
    MoaForSequenceClassification,
    MoaForTokenClassification,
    MoaModel,
)
from .mole import (
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
)
from .plm import (
    PlmConfig,
    PlmForCausalLM,
    PlmForSequenceClassification,
    PlmForTokenClassification,
    PlmModel,
)
from .rmoe import (
    RMoeConfig,
    RMoeForCausalLM,
    RMoeForSequenceClassification,
    RMoeForTokenClassification,
    RMoeModel,
)
from .sigma import (
    SigmaConfig,
    SigmaForCausalLM,
    SigmaForSequenceClassification,
    SigmaForTokenClassification,
    SigmaModel,
)
from .switchhead import (
    SwitchHeadConfig,
    SwitchHeadForCausalLM,
    SwitchHeadForSequenceClassification,
    SwitchHeadForTokenClassification,
    SwitchHeadModel,
)

ARCHITECTURES = {  # model_type -> (config, decoder, causal language model)
    "hf_moe": (HfMoeConfig, HfMoeModel, HfMoeForCausalLM),
    "bam": (BamConfig, BamModel, BamForCausalLM),
    "based": (BasedConfig, BasedModel, BasedForCausalLM),
    "moa": (MoaConfig, MoaModel, MoaForCausalLM),
    "rmoe": (RMoeConfig, RMoeModel, RMoeForCausalLM),
    "mole": (MoleConfig, MoleModel, MoleForCausalLM),
    "peripheral_lm": (PlmConfig, PlmModel, PlmForCausalLM),
    "sigma": (SigmaConfig, SigmaModel, SigmaForCausalLM),
    "switchhead": (SwitchHeadConfig, SwitchHeadModel, SwitchHeadForCausalLM),
}

CLASSIFIERS = {  # model_type -> (sequence classifier, token classifier)
    "hf_moe": (HfMoeForSequenceClassification, HfMoeForTokenClassification),
    "bam": (BamForSequenceClassification, BamForTokenClassification),
    "based": (BasedForSequenceClassification, BasedForTokenClassification),
    "moa": (MoaForSequenceClassification, MoaForTokenClassification),
    "rmoe": (RMoeForSequenceClassification, RMoeForTokenClassification),
    "mole": (MoleForSequenceClassification, MoleForTokenClassification),
    "peripheral_lm": (PlmForSequenceClassification, PlmForTokenClassification),
    "sigma": (SigmaForSequenceClassification, SigmaForTokenClassification),
    "switchhead": (SwitchHeadForSequenceClassification, SwitchHeadForTokenClassification),
}
