"""PLM as published: type `plm`, a name that others use for protein language models; `hf_moe.enable("plm")`.

PLM-Team/PLM-1.8B-{Base,Instruct}; fields and saved names are those of its config.json and safetensors files.
"""

from huggingface_hub.dataclasses import strict

from ..architectures.plm import PlmConfig
from ..modeling.model import model_classes


@strict
class PublishedPlmConfig(PlmConfig):
    """`PlmConfig` under the published type."""

    model_type = "plm"


(
    PublishedPlmModel,
    PublishedPlmForCausalLM,
    PublishedPlmForSequenceClassification,
    PublishedPlmForTokenClassification,
) = model_classes("PublishedPlm", PublishedPlmConfig)
