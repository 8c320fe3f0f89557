"""Public checkpoints that `hf-moe import` rewrites, each family in a file of its own."""

from .base import Imported, Importer, Made
from .blockffn import BLOCKFFN
from .llama_moe_v2 import LLAMA_MOE_V2
from .plm import PLM

IMPORTERS = {importer.name: importer for importer in (BLOCKFFN, LLAMA_MOE_V2, PLM)}

__all__ = ["IMPORTERS", "Imported", "Importer", "Made"]
