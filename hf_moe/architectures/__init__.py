"""Published architectures: each file spells one paper in terms of parts. Importing them registers them."""

from ..modeling.host import register
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
from .blockffn import (
    BlockFfnConfig,
    BlockFfnForCausalLM,
    BlockFfnForSequenceClassification,
    BlockFfnForTokenClassification,
    BlockFfnModel,
)
from .coe import (
    CoeConfig,
    CoeForCausalLM,
    CoeForSequenceClassification,
    CoeForTokenClassification,
    CoeModel,
)
from .deepseek_moe import (
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)
from .dynamic_moe import (
    DynamicMoeConfig,
    DynamicMoeForCausalLM,
    DynamicMoeForSequenceClassification,
    DynamicMoeForTokenClassification,
    DynamicMoeModel,
)
from .hf_moe import (
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)
from .ling import (
    LingConfig,
    LingForCausalLM,
    LingForSequenceClassification,
    LingForTokenClassification,
    LingModel,
)
from .moa import (
    MoaConfig,
    MoaForCausalLM,
    MoaForSequenceClassification,
    MoaForTokenClassification,
    MoaModel,
)
from .moe_x import (
    MoeXConfig,
    MoeXForCausalLM,
    MoeXForSequenceClassification,
    MoeXForTokenClassification,
    MoeXModel,
)
from .moge import (
    MogeConfig,
    MogeForCausalLM,
    MogeForSequenceClassification,
    MogeForTokenClassification,
    MogeModel,
)
from .mole import (
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
)
from .monet import (
    MonetConfig,
    MonetForCausalLM,
    MonetForSequenceClassification,
    MonetForTokenClassification,
    MonetModel,
)
from .peer import (
    PeerConfig,
    PeerForCausalLM,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
)
from .plm import (
    PlmConfig,
    PlmForCausalLM,
    PlmForSequenceClassification,
    PlmForTokenClassification,
    PlmModel,
)
from .rexmoe import (
    RexMoeConfig,
    RexMoeForCausalLM,
    RexMoeForSequenceClassification,
    RexMoeForTokenClassification,
    RexMoeModel,
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
from .smoe_dropout import (
    SmoeDropoutConfig,
    SmoeDropoutForCausalLM,
    SmoeDropoutForSequenceClassification,
    SmoeDropoutForTokenClassification,
    SmoeDropoutModel,
)
from .switchhead import (
    SwitchHeadConfig,
    SwitchHeadForCausalLM,
    SwitchHeadForSequenceClassification,
    SwitchHeadForTokenClassification,
    SwitchHeadModel,
)
from .thor import (
    ThorConfig,
    ThorForCausalLM,
    ThorForSequenceClassification,
    ThorForTokenClassification,
    ThorModel,
)
from .ultramem import (
    UltraMemConfig,
    UltraMemForCausalLM,
    UltraMemForSequenceClassification,
    UltraMemForTokenClassification,
    UltraMemModel,
)
from .widenet import (
    WideNetConfig,
    WideNetForCausalLM,
    WideNetForSequenceClassification,
    WideNetForTokenClassification,
    WideNetModel,
)

ARCHITECTURES = {  # model_type -> (config, decoder, causal language model)
    "hf_moe": (HfMoeConfig, HfMoeModel, HfMoeForCausalLM),
    "bam": (BamConfig, BamModel, BamForCausalLM),
    "based": (BasedConfig, BasedModel, BasedForCausalLM),
    "coe": (CoeConfig, CoeModel, CoeForCausalLM),
    "deepseek_moe": (DeepseekMoeConfig, DeepseekMoeModel, DeepseekMoeForCausalLM),
    "ling": (LingConfig, LingModel, LingForCausalLM),
    "moa": (MoaConfig, MoaModel, MoaForCausalLM),
    "rexmoe": (RexMoeConfig, RexMoeModel, RexMoeForCausalLM),
    "rmoe": (RMoeConfig, RMoeModel, RMoeForCausalLM),
    "mole": (MoleConfig, MoleModel, MoleForCausalLM),
    "monet": (MonetConfig, MonetModel, MonetForCausalLM),
    "peripheral_lm": (PlmConfig, PlmModel, PlmForCausalLM),
    "sigma": (SigmaConfig, SigmaModel, SigmaForCausalLM),
    "switchhead": (SwitchHeadConfig, SwitchHeadModel, SwitchHeadForCausalLM),
    "moe_x": (MoeXConfig, MoeXModel, MoeXForCausalLM),
    "smoe_dropout": (SmoeDropoutConfig, SmoeDropoutModel, SmoeDropoutForCausalLM),
    "thor": (ThorConfig, ThorModel, ThorForCausalLM),
    "widenet": (WideNetConfig, WideNetModel, WideNetForCausalLM),
    "blockffn": (BlockFfnConfig, BlockFfnModel, BlockFfnForCausalLM),
    "dynamic_moe": (DynamicMoeConfig, DynamicMoeModel, DynamicMoeForCausalLM),
    "moge": (MogeConfig, MogeModel, MogeForCausalLM),
    "peer": (PeerConfig, PeerModel, PeerForCausalLM),
    "ultramem": (UltraMemConfig, UltraMemModel, UltraMemForCausalLM),
}

CLASSIFIERS = {  # model_type -> (sequence classifier, token classifier)
    "hf_moe": (HfMoeForSequenceClassification, HfMoeForTokenClassification),
    "bam": (BamForSequenceClassification, BamForTokenClassification),
    "based": (BasedForSequenceClassification, BasedForTokenClassification),
    "coe": (CoeForSequenceClassification, CoeForTokenClassification),
    "deepseek_moe": (DeepseekMoeForSequenceClassification, DeepseekMoeForTokenClassification),
    "ling": (LingForSequenceClassification, LingForTokenClassification),
    "moa": (MoaForSequenceClassification, MoaForTokenClassification),
    "rexmoe": (RexMoeForSequenceClassification, RexMoeForTokenClassification),
    "rmoe": (RMoeForSequenceClassification, RMoeForTokenClassification),
    "mole": (MoleForSequenceClassification, MoleForTokenClassification),
    "monet": (MonetForSequenceClassification, MonetForTokenClassification),
    "peripheral_lm": (PlmForSequenceClassification, PlmForTokenClassification),
    "sigma": (SigmaForSequenceClassification, SigmaForTokenClassification),
    "switchhead": (SwitchHeadForSequenceClassification, SwitchHeadForTokenClassification),
    "moe_x": (MoeXForSequenceClassification, MoeXForTokenClassification),
    "smoe_dropout": (SmoeDropoutForSequenceClassification, SmoeDropoutForTokenClassification),
    "thor": (ThorForSequenceClassification, ThorForTokenClassification),
    "widenet": (WideNetForSequenceClassification, WideNetForTokenClassification),
    "blockffn": (BlockFfnForSequenceClassification, BlockFfnForTokenClassification),
    "dynamic_moe": (DynamicMoeForSequenceClassification, DynamicMoeForTokenClassification),
    "moge": (MogeForSequenceClassification, MogeForTokenClassification),
    "peer": (PeerForSequenceClassification, PeerForTokenClassification),
    "ultramem": (UltraMemForSequenceClassification, UltraMemForTokenClassification),
}

for model_type, classes in ARCHITECTURES.items():
    register(*classes, *CLASSIFIERS[model_type])  # pyright: ignore[reportCallIssue] - five classes
del classes, model_type
