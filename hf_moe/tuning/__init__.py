"""Parameter-efficient fine-tuning of mixtures of experts, registered with PEFT (the only package that imports it)."""

from .esft import EsftConfig, esft_config, load_selection, save_selection, score_experts, select_experts
from .expert_lora import ExpertLoraConfig
from .hydra_lora import HydraLoraConfig
from .lora import lora_config
from .mix_lora import MixLoraConfig
from .mola import MolaConfig
from .routed_lora import set_accumulation
from .smora import SmoraBalancing, SmoraConfig
