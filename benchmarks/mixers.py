"""Our mixers next to Transformers' torch code of the same layers: ratios taken in one run, on the CPU.

    python -m benchmarks.mixers                       # every section
    python -m benchmarks.mixers training --time 2048  # one of them

Sections named `decoding`, `latent`, `prefill` and `memory` are those of `benchmarks.decoding`, which describes them.

Repetitions of both are interleaved, so that a slow minute of the machine meets both; the ratio is taken pair by pair.
Peak memory is that of one forward and backward pass in a process of its own: the high-water mark of resident memory
(`VmHWM`, reset just before) minus what was resident before, so weights and inputs do not count, gradients do. The
process returns large blocks to the system at once (`MALLOC_MMAP_THRESHOLD_`): holes in its heap do not count either.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import KimiLinearConfig, Qwen3NextConfig, logging
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from hf_moe.modeling.mixers import GatedDeltaNet, KimiDeltaAttention
from hf_moe.modeling.ops.delta_rule import delta_rule
from hf_moe.modeling.packing import Rows

from . import decoding

WIDTH, HEADS, HEAD_DIM = 512, 4, 128  # key heads = value heads, K = V
SIDES = ("ours", "transformers")
Inputs = list[torch.Tensor]


class Case(NamedTuple):
    """Two functions that do the same, and what they are given."""

    inputs: Callable[[int], Inputs]  # of a length
    ours: Callable[..., torch.Tensor]
    transformers: Callable[..., torch.Tensor]


def delta_inputs(length: int, per_channel: bool) -> Inputs:
    """Query, key, value, log-decay and beta."""
    query, key, value = (torch.randn(1, length, HEADS, HEAD_DIM) for _ in range(3))
    decay = -torch.rand(1, length, HEADS, *[HEAD_DIM] * per_channel)
    return [x.requires_grad_() for x in (query, key, value, decay, torch.rand(1, length, HEADS))]


def our_rule(*inputs: torch.Tensor) -> torch.Tensor:
    """The rule from an empty state."""
    return delta_rule(*inputs, torch.zeros(1, HEADS, HEAD_DIM, HEAD_DIM), Rows())[0]


def rule_case(native: Callable[..., Any], per_channel: bool) -> Case:
    """The delta rule alone."""
    return Case(
        lambda length: delta_inputs(length, per_channel),
        our_rule,
        lambda *inputs: native(*inputs, use_qk_l2norm_in_kernel=True)[0],
    )


def layer_case(mixer: type[Any], native: torch.nn.Module) -> Case:
    """A whole layer."""
    config = argparse.Namespace(
        hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-6, num_hidden_layers=1
    )
    ours = mixer(config, 0)
    for module in (ours, native):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return Case(
        lambda length: [torch.randn(1, length, WIDTH, requires_grad=True)],
        lambda hidden_states: ours(hidden_states, None)[0],
        native,
    )


def training_case(name: str) -> Case:
    """Build one case of `training`; the names are those of `TRAINING`."""
    common = {"hidden_size": WIDTH, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    if name == "gated_delta_net rule":
        return rule_case(qwen3_next.torch_chunk_gated_delta_rule, per_channel=False)
    if name == "kimi_delta_attention rule":
        return rule_case(kimi_linear.chunk_kimi_delta_attention, per_channel=True)
    if name == "gated_delta_net layer":
        sizes = {"linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS}
        widths = {"linear_key_head_dim": HEAD_DIM, "linear_value_head_dim": HEAD_DIM}
        qwen_config = Qwen3NextConfig(**common, **sizes, **widths)
        return layer_case(GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet(qwen_config, 0))
    sizes = {"linear_num_heads": HEADS, "linear_head_dim": HEAD_DIM, "mlp_layer_types": ["dense"]}
    kimi_config = KimiLinearConfig(**common, **sizes)
    return layer_case(KimiDeltaAttention, kimi_linear.KimiLinearDeltaAttention(kimi_config, 0))


TRAINING = {  # case -> at most how often, and at least how many times as fast as Transformers
    "gated_delta_net rule": (15, 1.0),
    "gated_delta_net layer": (15, 1.0),
    "kimi_delta_attention rule": (3, 1.5),
    "kimi_delta_attention layer": (3, 1.5),
}


def step(work: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    """Forward and backward pass."""
    work(*inputs).sum().backward()


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(ours: Callable[[], Any], peer: Callable[[], Any], repetitions: int) -> tuple[float, float, list[float]]:
    """Median seconds of both, and the quartiles of how many times as long the peer takes."""
    ours(), peer()  # warm-up
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repetitions)]
    mine, theirs = (statistics.median(times) for times in zip(*pairs))
    return mine, theirs, statistics.quantiles((theirs / mine for mine, theirs in pairs), n=4)


def resident(field: str) -> int:
    """Bytes of resident memory: `VmRSS` now, or `VmHWM` at most."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, field
    return int(match[1]) * 1024


def measure_peak(name: str, side: str, length: int, threads: int) -> int:
    """Peak memory of one step, in a fresh process."""
    torch.set_num_threads(threads)
    case = training_case(name)
    work = getattr(case, side)
    step(work, case.inputs(64))  # what is set up once
    inputs = case.inputs(length)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(work, inputs)
    return resident("VmHWM") - before


def peak_memory(*arguments: Any) -> int:
    """`measure_peak` of these arguments, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # glibc reads it when a process starts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, arguments)


def training(args: argparse.Namespace) -> None:
    """Forward and backward pass of a long sequence: time and peak memory."""
    print(f"forward + backward, fp32, 1 x {args.time} tokens, width {WIDTH}, {HEADS} heads, K = V = {HEAD_DIM}")
    for name, (most, bar) in TRAINING.items():
        case = training_case(name)
        inputs = case.inputs(args.time)
        works = [lambda side=side: step(getattr(case, side), inputs) for side in SIDES]  # noqa: B023
        mine, theirs, (low, median, high) = compare(*works, min(most, args.repetitions))
        memory = [peak_memory(name, side, args.time, args.threads) / 2**20 for side in SIDES]
        print(
            f"{name:<27} ours {mine:.3f} s, {memory[0]:.0f} MiB   transformers {theirs:.3f} s, {memory[1]:.0f} MiB   "
            f"{median:5.2f} times as fast [{low:.2f}, {high:.2f}] (bar {bar})   "
            f"memory {memory[0] / memory[1]:.2f} (bar 0.50)",
            flush=True,
        )


LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "q_lora_rank": None}


@torch.no_grad()
def kernel_works(per_channel: bool, length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward pass in bf16 on a GPU: through our rule, and of fla's kernel called directly."""
    module, name = ("kda", "chunk_kda") if per_channel else ("gated_delta_rule", "chunk_gated_delta_rule")
    kernel = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    query, key, value, decay, beta = (x.detach().cuda() for x in delta_inputs(length, per_channel))
    inputs = [x.requires_grad_() for x in (query.bfloat16(), key.bfloat16(), value.bfloat16(), decay, beta)]
    state = torch.zeros(1, HEADS, HEAD_DIM, HEAD_DIM, device="cuda")
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}

    def finish(output: torch.Tensor) -> None:
        output.sum().backward()
        torch.cuda.synchronize()

    return lambda: finish(delta_rule(*inputs, state, Rows())[0]), lambda: finish(kernel(*inputs, **options)[0])


def kernels(args: argparse.Namespace) -> None:
    """On a GPU: what we add to fla's kernels."""
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        print("kernels: left out, needs CUDA and flash-linear-attention")
        return
    print(f"forward + backward, bf16, {torch.cuda.get_device_name()}, {HEADS} heads, K = V = {HEAD_DIM}")
    for name, per_channel in (("gated_delta_net rule", False), ("kimi_delta_attention rule", True)):
        for length in (args.time, 8 * args.time):
            mine, theirs, (low, median, high) = compare(*kernel_works(per_channel, length), 20 * args.repetitions)
            print(
                f"{name:<27} {length:6} tokens   ours {mine * 1e3:.3f} ms   fla {theirs * 1e3:.3f} ms   "
                f"{median:.3f} times as fast [{low:.3f}, {high:.3f}] (bar 0.97)",
                flush=True,
            )


SECTIONS = {"training": training, "kernels": kernels, **decoding.SECTIONS}


def main() -> None:
    """Run the sections that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--time", type=int, default=4096, help="tokens of a training sequence")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(namespace=argparse.Namespace(device="cpu"))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()  # Transformers says that it falls back to torch: that is what is measured
    print(f"torch {torch.__version__}, {args.threads} threads")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
