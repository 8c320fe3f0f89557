"""Our sparse feed-forwards next to a peer, in one run: the same weights, the same experts backend.

    python -m benchmarks.feed_forward                    everything
    python -m benchmarks.feed_forward native             `moe` / Transformers' Qwen3-MoE block
    python -m benchmarks.feed_forward recurrent          RMoE's router / a plain top-k router, the same block otherwise
    python -m benchmarks.feed_forward variable           top-p, and null experts, with k experts on average / fixed k
    python -m benchmarks.feed_forward memory             the largest tensor that 262,144 experts ever need
    python -m benchmarks.feed_forward native --implementation batched_mm --tokens 512

Repetitions of both are interleaved, so that a slow minute of the machine meets both; the ratio is taken pair by pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.feed_forwards import FEED_FORWARDS
from hf_moe.modeling.feed_forwards.moe import Moe
from hf_moe.modeling.parts import resolve

Work = Callable[[], Any]


def our_config(args: argparse.Namespace) -> argparse.Namespace:
    """What a feed-forward reads of a model's config."""
    return argparse.Namespace(
        hidden_size=args.width,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        _experts_implementation=args.implementation,
    )


def our_moe(args: argparse.Namespace, router: dict[str, Any], **options: Any) -> Moe:
    """Our block with a router of choice, initialised as a model would."""
    experts = {"type": "swiglu", "intermediate_size": args.expert_width}
    options = {"num_experts": args.experts, **options}
    moe = Moe(our_config(args), 0, router=router, experts=experts, **options)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.02)
    return moe.to(args.device, args.dtype)


def native_moe(args: argparse.Namespace) -> nn.Module:
    """Transformers' block."""
    config = Qwen3MoeConfig(
        hidden_size=args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.expert_width,
        norm_topk_prob=True,
    )
    config._experts_implementation = args.implementation
    return Qwen3MoeSparseMoeBlock(config).to(args.device, args.dtype)


def seconds(work: Work, device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Work, peer: Work, args: argparse.Namespace) -> float:
    """Print the medians of both and the median ratio with its quartiles."""
    ours(), peer()  # warm-up
    pairs = [(seconds(ours, args.device), seconds(peer, args.device)) for _ in range(args.repetitions)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    low, median, high = statistics.quantiles(ratios, n=4)
    mine, theirs = (statistics.median(times) * 1e3 for times in zip(*pairs))
    print(f"{name:<40} ours {mine:9.2f} ms   peer {theirs:9.2f} ms   ratio {median:.3f} [{low:.3f}, {high:.3f}]")
    return median


def step(module: nn.Module, tokens: torch.Tensor, backward: bool, shared: nn.ModuleDict | None = None) -> Work:
    """A forward pass, or one with its backward pass."""
    inputs = () if shared is None else (None, ForwardContext(shared))

    def work() -> None:
        with torch.set_grad_enabled(backward):
            output = module(tokens, *inputs)
            output = output[0] if isinstance(output, tuple) else output
        if backward:
            module.zero_grad()
            output.sum().backward()

    return work


def native(args: argparse.Namespace, tokens: torch.Tensor) -> None:
    """Our `moe` with Transformers' weights."""
    peer = native_moe(args)
    ours = our_moe(args, {"type": "top_k", "top_k": args.top_k})
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens)[0], peer(tokens))
    for name, backward in (("forward", False), ("forward + backward", True)):
        compare(f"moe / Qwen3-MoE, {name}", step(ours, tokens, backward), step(peer, tokens, backward), args)


def recurrent(args: argparse.Namespace, tokens: torch.Tensor) -> None:
    """What a recurrent router costs."""
    options = {"type": "recurrent", "top_k": args.top_k, "state_size": 128, "cell": "gru"}
    ours = our_moe(args, options)
    peer = our_moe(args, {"type": "top_k", "top_k": args.top_k})
    shared = nn.ModuleDict(type(ours.gate).shared_modules(our_config(args), state_size=128, cell="gru"))
    for parameter in shared.parameters():
        nn.init.normal_(parameter, std=0.02)
    shared = shared.to(args.device, args.dtype)
    for name, backward in (("forward", False), ("forward + backward", True)):
        compare(f"recurrent / top_k, {name}", step(ours, tokens, backward, shared), step(peer, tokens, backward), args)


def variable(args: argparse.Namespace, tokens: torch.Tensor) -> None:
    """Routers that use k experts on average."""
    peer = our_moe(args, {"type": "top_k", "top_k": args.top_k, "normalize": False})
    with_nulls = our_moe(
        args,
        {"type": "top_k", "top_k": args.top_k * 3 // 2, "normalize": False},
        num_zero_experts=args.experts // 2,
        zero_expert_type="null",
    )
    nucleus = our_moe(args, {"type": "top_p", "p": 0.5})
    nn.init.normal_(nucleus.gate.weight, std=0.1)  # logits of a trained router's spread
    low, high = 0.0, 1.0
    for _ in range(20):  # the threshold that lets k pass on average
        nucleus.gate.p = (low + high) / 2
        chosen = (nucleus.gate(tokens.flatten(0, 1)).weights != 0).sum(-1).float().mean()
        low, high = (nucleus.gate.p, high) if chosen < args.top_k else (low, nucleus.gate.p)
    for name, ours in (("null experts", with_nulls), ("top_p", nucleus)):
        routing = ours.gate(tokens.flatten(0, 1))
        used = ((routing.weights != 0) & (routing.indices < args.experts)).sum(-1).float()
        print(f"{name}: {used.mean():.2f} experts per token, {used.min():.0f} to {used.max():.0f}")
        for work, backward in (("forward", False), ("forward + backward", True)):
            compare(f"{name} / fixed k, {work}", step(ours, tokens, backward), step(peer, tokens, backward), args)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().size() // tensor.element_size())
        return result


def memory(args: argparse.Namespace, tokens: torch.Tensor) -> None:
    """Forward and backward of the feed-forwards with 512 x 512 experts."""
    cases = {
        "monet, vertical": {"type": "monet", "expert_size": 12, "num_heads": 6, "top_k": 32},
        "monet, horizontal": {
            "type": "monet",
            "expert_size": 12,
            "num_heads": 6,
            "top_k": 32,
            "decomposition": "horizontal",
        },
        "ultra_mem": {"type": "ultra_mem", "value_size": 192, "pre_value_size": 64, "intermediate_size": 512},
        "peer": {"type": "peer"},
    }
    for name, options in cases.items():
        options = resolve(FEED_FORWARDS, {"num_keys": 512, **options})
        part, config = FEED_FORWARDS[options.pop("type")], our_config(args)
        shared = nn.ModuleDict(part.shared_modules(config, **options))
        module = part(config, 0, **options)
        for parameter in (*module.parameters(), *shared.parameters()):
            nn.init.normal_(parameter, std=0.02)
        weights = max(parameter.numel() for parameter in (*module.parameters(), *shared.parameters()))
        with LargestTensor() as largest:
            step(module, tokens, False, shared)()
        product = tokens.shape[1] * 512 * 512
        print(
            f"{name}: largest tensor in a forward pass {largest.elements:,} elements; largest weight {weights:,}; "
            f"tokens x experts would be {product:,}"
        )


SECTIONS = {"native": native, "recurrent": recurrent, "variable": variable, "memory": memory}


def main() -> None:
    """Run the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", choices=SECTIONS)
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
    print(
        f"{args.implementation}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads: width {args.width}, "
        f"{args.experts} experts of {args.expert_width}, top-{args.top_k}, {args.tokens} tokens"
    )
    for section in [args.section] if args.section else SECTIONS:
        torch.manual_seed(0)
        tokens = torch.randn(1, args.tokens, args.width, device=args.device, dtype=args.dtype)
        SECTIONS[section](args, tokens)


if __name__ == "__main__":
    main()
