"""Parameter-efficient fine-tuning of mixtures of experts, registered with PEFT (the only package that imports it)."""

from .compeft import compress_adapter, decompress_adapter
from .esft import EsftConfig, esft_config, load_selection, save_selection, score_experts, select_experts
from .esft_files import export_esft, import_esft
from .expert_lora import ExpertLoraConfig
from .expert_weave import ExpertWeave
from .export import export_adapter, import_adapter
from .exssnet import ExssnetConfig, copy_scores, nearest_task, set_density, train_weights
from .hydra_lora import HydraLoraConfig
from .lora import lora_config
from .mix_lora import MixLoraConfig
from .mola import MolaConfig
from .pst import PstConfig
from .ramt import RamtConfig, gradient_dropout, regularized_backward
from .reweighted import SparsityRamp
from .routed_lora import set_accumulation
from .scalearn import ScalearnConfig
from .smora import SmoraBalancing, SmoraConfig
