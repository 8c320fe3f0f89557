"""Makes our methods known to PEFT, whose list of methods is closed (PEFT 0.21)."""

from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> Any:
    """The member of PEFT's enum for a method, made if it is not there; PEFT refuses names outside its enum."""
    key = name.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    member: Any = str.__new__(PeftType, key)
    member._name_ = member._value_ = key
    member._sort_order_, member.__objclass__ = len(PeftType.__members__), PeftType
    PeftType._member_map_[key] = PeftType._value2member_map_[key] = member
    PeftType._member_names_.append(key)
    type.__setattr__(PeftType, key, member)
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Let `get_peft_model`, `PeftModel.from_pretrained` and Transformers' `load_adapter` find a method.

    PEFT's own `register_peft_method` is not used, for it wants a prefix that no other method has; ours that extend
    LoRA share its prefix, by which the tensors of an adapter are told from the model's.

    Args:
        name: lower case; the `peft_type` in `adapter_config.json` is the same in capitals.
        config_class: sets `peft_type` to `add_peft_type(name)`.
        model_class: with its `prefix`.

    A process that loads such an adapter must have imported `hf_moe.tuning`; PEFT ends in a KeyError otherwise.
    """
    peft_type = add_peft_type(name)
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_class.prefix
