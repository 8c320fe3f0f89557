"""Parameter-efficient fine-tuning of mixtures of experts, registered with PEFT (the only package that imports it)."""

from .compeft import compress_adapter, decompress_adapter
from .esft import EsftConfig, esft_config, load_selection, save_selection, score_experts, select_experts
from .esft_files import export_esft, import_esft
from .expert_lora import ExpertLoraConfig
from .expert_weave import ExpertWeave
from .export import export_adapter, import_adapter
from .hydra_lora import HydraLoraConfig
from .lora import lora_config
from .mix_lora import MixLoraConfig
from .mola import MolaConfig
from .routed_lora import set_accumulation
from .smora import SmoraBalancing, SmoraConfig
