"""Methods: which source tensors each tensor of a mixture is made of."""

from .bam import Bam
from .base import Exactness, Guarantee, Ingredients, Method
from .btx import Btx
from .copies import Copy

METHODS: dict[str, type[Method]] = {method.name: method for method in (Copy, Btx, Bam)}
