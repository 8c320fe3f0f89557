"""PLM (https://arxiv.org/abs/2503.12167), whose type `plm` others use too: PLM-Team/PLM-1.8B-*."""

from dataclasses import fields

from ...architectures import PlmConfig
from .base import Imported, Importer, Made, Raw, require


def recognises(raw: Raw) -> bool:
    """The type, with latent attention: protein language models have none."""
    return raw.get("model_type") == "plm" and "kv_lora_rank" in raw


def read(raw: Raw) -> Imported:
    """The same fields and names under our type, `peripheral_lm`."""
    require(raw, "PLM", {"rope_scaling": None, "attention_bias": False})
    known = {field.name for field in fields(PlmConfig)} | {"rope_theta"}
    ours = {name: value for name, value in raw.items() if name in known and name not in ("architectures", "dtype")}
    return Imported(PlmConfig(**ours), Made)


PLM = Importer("PLM", recognises, read)
