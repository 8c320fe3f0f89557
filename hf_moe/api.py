"""Everything that `hf_moe` offers; imported when the first of it is asked for (see `lazy.py`)."""

from typing import Any

from .architectures import (
    ARCHITECTURES,
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
    BlockFfnConfig,
    BlockFfnForCausalLM,
    BlockFfnForSequenceClassification,
    BlockFfnForTokenClassification,
    BlockFfnModel,
    CoeConfig,
    CoeForCausalLM,
    CoeForSequenceClassification,
    CoeForTokenClassification,
    CoeModel,
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
    DynamicMoeConfig,
    DynamicMoeForCausalLM,
    DynamicMoeForSequenceClassification,
    DynamicMoeForTokenClassification,
    DynamicMoeModel,
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    LingConfig,
    LingForCausalLM,
    LingForSequenceClassification,
    LingForTokenClassification,
    LingModel,
    MoaConfig,
    MoaForCausalLM,
    MoaForSequenceClassification,
    MoaForTokenClassification,
    MoaModel,
    MoeXConfig,
    MoeXForCausalLM,
    MoeXForSequenceClassification,
    MoeXForTokenClassification,
    MoeXModel,
    MogeConfig,
    MogeForCausalLM,
    MogeForSequenceClassification,
    MogeForTokenClassification,
    MogeModel,
    MoleConfig,
    MoleForCausalLM,
    MoleForSequenceClassification,
    MoleForTokenClassification,
    MoleModel,
    MonetConfig,
    MonetForCausalLM,
    MonetForSequenceClassification,
    MonetForTokenClassification,
    MonetModel,
    PeerConfig,
    PeerForCausalLM,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PlmConfig,
    PlmForCausalLM,
    PlmForSequenceClassification,
    PlmForTokenClassification,
    PlmModel,
    RexMoeConfig,
    RexMoeForCausalLM,
    RexMoeForSequenceClassification,
    RexMoeForTokenClassification,
    RexMoeModel,
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
    SmoeDropoutConfig,
    SmoeDropoutForCausalLM,
    SmoeDropoutForSequenceClassification,
    SmoeDropoutForTokenClassification,
    SmoeDropoutModel,
    SwitchHeadConfig,
    SwitchHeadForCausalLM,
    SwitchHeadForSequenceClassification,
    SwitchHeadForTokenClassification,
    SwitchHeadModel,
    ThorConfig,
    ThorForCausalLM,
    ThorForSequenceClassification,
    ThorForTokenClassification,
    ThorModel,
    UltraMemConfig,
    UltraMemForCausalLM,
    UltraMemForSequenceClassification,
    UltraMemForTokenClassification,
    UltraMemModel,
    WideNetConfig,
    WideNetForCausalLM,
    WideNetForSequenceClassification,
    WideNetForTokenClassification,
    WideNetModel,
)
from .modeling import (
    BLOCKS,
    EXPERTS,
    FEED_FORWARDS,
    MIXERS,
    ROUTERS,
    CacheMemory,
    DecoderConfig,
    MoeLayer,
    ParameterCounts,
    cache_memory,
    count_parameters,
    moe_layers,
    register,
)
from .modeling.code_files import STANDALONE, WRITERS
from .published import AMBIGUOUS, PUBLISHED


def enable(*model_types: str) -> None:
    """Register public checkpoints whose model type other packages use for something else.

    Args:
        model_types: names in `hf_moe.published.AMBIGUOUS`: `plm`.

    Raises:
        ValueError: an unknown name.
    """
    if unknown := sorted(set(model_types) - AMBIGUOUS.keys()):
        raise ValueError(f"{unknown} cannot be enabled; choose from {sorted(AMBIGUOUS)}.")
    for model_type in model_types:
        register(*AMBIGUOUS[model_type])


def register_with_vllm() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in each of its processes; importing us was all it takes."""


def flat_file(config: DecoderConfig) -> str:
    """The architecture of a config as one file; the writer of it is imported when it is asked for."""
    from .hub.flatten import flatten

    return flatten(config)


WRITERS[STANDALONE] = flat_file


def __getattr__(name: str) -> Any:
    """`hf_moe.lora_config` needs PEFT, which is imported when it is asked for."""
    if name == "lora_config":
        from .tuning import lora_config

        return lora_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
