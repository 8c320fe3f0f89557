"""Our sparse feed-forward next to Transformers' Qwen3-MoE block: the same weights, the same experts backend, one run.

    python -m benchmarks.feed_forward
    python -m benchmarks.feed_forward --implementation batched_mm --tokens 512

Repetitions of both are interleaved, so that a slow minute of the machine meets both; the ratio is taken pair by pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hf_moe.modeling.feed_forwards.moe import Moe


def blocks(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Our block and the native one, with equal weights."""
    native_config = Qwen3MoeConfig(
        hidden_size=args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.expert_width,
        norm_topk_prob=True,
    )
    native_config._experts_implementation = args.implementation
    native = Qwen3MoeSparseMoeBlock(native_config)
    config = argparse.Namespace(hidden_size=args.width, hidden_act="silu", _experts_implementation=args.implementation)
    ours = Moe(
        config,
        0,
        num_experts=args.experts,
        router={"type": "top_k", "top_k": args.top_k},
        experts={"type": "swiglu", "intermediate_size": args.expert_width},
    )
    for parameter in native.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours.load_state_dict(native.state_dict())
    return ours.to(args.device, args.dtype), native.to(args.device, args.dtype)


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], None], peer: Callable[[], None], args: argparse.Namespace) -> float:
    """Print the medians of both and the median ratio with its quartiles."""
    ours(), peer()  # warm-up
    pairs = [(seconds(ours, args.device), seconds(peer, args.device)) for _ in range(args.repetitions)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    low, median, high = statistics.quantiles(ratios, n=4)
    mine, theirs = (statistics.median(times) * 1e3 for times in zip(*pairs))
    print(f"{name:<20} ours {mine:9.2f} ms   native {theirs:9.2f} ms   ratio {median:.3f} [{low:.3f}, {high:.3f}]")
    return median


def main() -> None:
    """Compare forward, and forward with backward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--implementation", default="grouped_mm")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, native = blocks(args)
    tokens = torch.randn(1, args.tokens, args.width, device=args.device, dtype=args.dtype)
    torch.testing.assert_close(ours(tokens)[0], native(tokens))

    def step(module: nn.Module, backward: bool) -> Callable[[], None]:
        def work() -> None:
            with torch.set_grad_enabled(backward):
                output = module(tokens)
                output = output[0] if isinstance(output, tuple) else output
            if backward:
                module.zero_grad()
                output.sum().backward()

        return work

    print(
        f"{args.implementation}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads: width {args.width}, "
        f"{args.experts} experts of {args.expert_width}, top-{args.top_k}, {args.tokens} tokens"
    )
    compare("forward", step(ours, False), step(native, False), args)
    compare("forward + backward", step(ours, True), step(native, True), args)


if __name__ == "__main__":
    main()
