"""Conversion: checkpoints into other checkpoints."""

from .methods import METHODS
from .options import Options
from .output import atomic_directory, check_output, save_upcycled
from .targets import TARGETS
from .upcycling import Plan, count_parameters, execute, plan_upcycling, upcycle
