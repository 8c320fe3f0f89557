"""LoRA on some of the stacked experts next to PEFT's own `target_parameters`, in one run.

    python -m benchmarks.expert_lora                           1, 4, 16 and all of 64 experts, one MoE layer
    python -m benchmarks.expert_lora --experts 128 --tokens 4096 --dtype bfloat16 --device cuda

PEFT adapts whole stacks only, so its time and memory are those of all experts whatever is wanted. A step is a forward
and a backward pass of one Qwen3-MoE block. Repetitions are interleaved, the ratio is taken pair by pair; memory is
what autograd keeps for the backward pass, weights of the base not counted.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_moe.tuning import ExpertLoraConfig

from .feed_forward import seconds

STACKS = ("gate_up_proj", "down_proj")


def model(args: argparse.Namespace) -> nn.Module:
    """One decoder layer, frozen, with a small vocabulary."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=args.width,
        moe_intermediate_size=args.expert_width,
        num_hidden_layers=1,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
        decoder_sparse_step=1,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(args.device, args.dtype)


def block(args: argparse.Namespace, adapted: int | None) -> nn.Module:
    """The sparse block with our adapter on so many experts, or with PEFT's on all (None)."""
    network, name = model(args), "model.layers.0.mlp.experts"
    if adapted is None:
        config = LoraConfig(r=args.rank, target_modules=[], target_parameters=[f"{name}.{stack}" for stack in STACKS])
    else:
        step = args.experts // adapted
        chosen = list(range(0, args.experts, step))[:adapted]
        config = ExpertLoraConfig(r=args.rank, target_modules=[name], experts={name: chosen})
    wrapped = get_peft_model(network, config, autocast_adapter_dtype=False)
    return wrapped.base_model.model.model.layers[0].mlp


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        output = layer(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()

    return run


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps for the backward pass, each storage once, without the base's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    size = sum(kept.values())
    del output
    return size


def compare(args: argparse.Namespace, adapted: int) -> None:
    """Print time and memory of both, and their ratios."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, args.tokens, args.width, generator=generator).to(args.device, args.dtype).requires_grad_()
    ours, stock = block(args, adapted), block(args, None)
    memory = kept_bytes(ours, x), kept_bytes(stock, x)
    works = step(ours, x), step(stock, x)
    for work in works:
        work()
    times = [[seconds(work, args.device) for work in works] for _ in range(args.repetitions)]
    ratios = sorted(a / b for a, b in times)
    low, high = (ratios[round(part * (len(ratios) - 1))] for part in (0.25, 0.75))
    mine, theirs = (statistics.median(column) * 1e3 for column in zip(*times))
    print(
        f"{adapted:4d} of {args.experts} experts: {mine:8.1f} ms, PEFT (all) {theirs:8.1f} ms, ratio "
        f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}];  kept {memory[0] / 2**20:7.1f} MB, PEFT "
        f"{memory[1] / 2**20:7.1f} MB, ratio {memory[0] / memory[1]:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 512, "expert-width": 256, "experts": 64, "top-k": 8, "rank": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    args = parser.parse_args()
    for adapted in (1, 4, 16, args.experts):
        compare(args, adapted)


if __name__ == "__main__":
    main()
