"""What dense models can become."""

from .base import Layout, Target
from .mole import MOLE
from .native import NATIVE_TARGETS
from .ours import OWN_TARGETS

TARGETS: dict[str, Target] = {**NATIVE_TARGETS, **OWN_TARGETS, "mole": MOLE}
