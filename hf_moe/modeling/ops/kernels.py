"""The optional kernels of flash-linear-attention (extra `fla`): which of them run, and how packed rows reach them.

Every kernel has a twin in torch, which runs wherever the kernel does not. Letters: B batch, T time.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

FLA_IS_INSTALLED = find_spec("fla") is not None
FLA_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}  # what has been imported so far

logger = logging.getLogger("hf_moe")


def fla_kernel(owner: str, module: str, name: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """Find the kernel for inputs like `tensor`, or None: then torch runs. The first use of each is logged.

    Args:
        owner: the mixer, for the log.
        module: such as "fla.ops.kda".
        name: the function in that module.
        tensor: one of the inputs.
    """
    if not tensor.is_cuda:
        reason = f"its tensors are on {tensor.device.type}, kernels need CUDA"
    elif tensor.dtype == torch.float64:
        reason = "the kernels have no float64"
    elif not FLA_IS_INSTALLED:
        reason = "flash-linear-attention is not installed: pip install 'hf_moe[fla]'"
    else:
        if (module, name) not in FLA_KERNELS:
            FLA_KERNELS[module, name] = getattr(import_module(module), name)
        log_implementation(owner, f"{module}.{name}")
        return FLA_KERNELS[module, name]
    log_implementation(owner, f"torch ({reason})")
    return None


def log_implementation(owner: str, implementation: str) -> None:
    """Say once what a mixer runs on; not while a graph is traced, which a log line would break."""
    if not is_compiling():
        log_once(f"{owner} runs on {implementation}.")


@cache
def log_once(message: str) -> None:
    """Log a message at its first use."""
    logger.info(message)


def run_fla(
    kernel: Callable[..., Any],
    inputs: dict[str, torch.Tensor],
    state: torch.Tensor,
    segments: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a kernel from and to fp32 states, on rows that may be packed.

    Args:
        kernel: from `fla_kernel`.
        inputs: its arguments (B, T, ...), by its names for them.
        state: (B, ...) of the sequence in each row's first column.
        segments: (B, T) ids of the packed sequences, or None.
        options: its other arguments; without a scale it gets 1, fla's own default is 1 / sqrt(key width).

    Returns:
        Output (B, T, ...) and the state of the sequence in each row's last column.
    """
    options = {"scale": 1.0, "output_final_state": True, **options}
    state = state.float()
    if segments is None:
        return kernel(**inputs, initial_state=state, **options)
    # the sequences of all rows in one line: the first of each row begins with the row's state, the others with zeros
    starts = F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)  # (B, T)
    index = starts.flatten().cumsum(0).view_as(starts) - 1
    limits = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    states = state.new_zeros(len(limits) - 1, *state.shape[1:]).index_copy(0, index[:, 0], state)
    line = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}
    output, states = kernel(**line, initial_state=states, cu_seqlens=limits, **options)
    return output.view(*segments.shape, *output.shape[2:]), states[index[:, -1]]
