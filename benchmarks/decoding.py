"""What one more token costs: recurrent layers next to softmax attention, latents absorbed next to expanded, prefill.

    python -m benchmarks.decoding                              # every section
    python -m benchmarks.decoding latent --json latent.json    # one of them, and the figures in a file

Every layer is a mixer of a one-layer model with the cache that this model makes; only the mixer is timed. Repetitions
take turns, so that a slow minute of the machine meets all; ratios are taken repetition by repetition and given as
`median [lower quartile, upper quartile]`. Recurrent caches are filled by reading that many tokens. Keys and values of
softmax layers are random numbers handed to the cache at once: what they are changes nothing in the time of a step.

`attention` steps through `DynamicCache`, which copies all keys and values to append one: that is what a user pays.
`attention, fixed` has its keys and values in one place and overwrites the last, the least that any cache could do.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DeepseekV3Config, DynamicCache, MiniMaxConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from hf_moe import HfMoeConfig, HfMoeModel, cache_memory

from .feed_forward import seconds

WIDTH, HEADS, HEAD_DIM = 512, 4, 128
SHORT, LONG = 1024, 32 * 1024  # tokens in the cache
LATENT_CONTEXT = 8 * 1024
PREFILLS = [1024, 2048, 4096, 8192, 16384]
SAMPLE, MOST_CALLS = 0.01, 50  # seconds and calls that make one repetition
RECURRENT = (
    "based",
    "short_convolution",
    "gated_delta_net",
    "kimi_delta_attention",
    "lightning_attention",
    "mamba2",
)
LATENT = {
    "type": "latent_attention",
    "kv_lora_rank": 128,  # a quarter of the width, as in PLM; heads are those of DeepSeek-V3 and PLM
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
STACKS = {  # patterns of eight layers
    "attention only": ["attention"],
    "attention only, 1 key head": ["attention"],
    "3 kimi_delta_attention : 1 attention": ["kimi_delta_attention"] * 3 + ["attention"],
    "3 kimi_delta_attention : 1 latent_attention": ["kimi_delta_attention"] * 3 + ["latent_attention"],
    "7 lightning_attention : 1 attention": ["lightning_attention"] * 7 + ["attention"],
    "kimi_delta_attention only": ["kimi_delta_attention"],
}
Work = Callable[[], Any]
Times = dict[str, list[float]]  # work -> seconds per call, one number per repetition


class Ratio(NamedTuple):
    """A median with its quartiles, and the limit it should keep."""

    low: float
    median: float
    high: float
    bar: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median keeps to the bar, if there is one."""
        return None if self.bar is None else self.median <= self.bar if self.at_most else self.median >= self.bar

    def __str__(self) -> str:
        mark = {None: "", True: " ok", False: " MISSED"}[self.met]
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]{mark}"


def spread(values: list[float], bar: float | None = None, at_most: bool = False) -> Ratio:
    """Quartiles of what was taken repetition by repetition."""
    return Ratio(*statistics.quantiles(values, n=4), bar, at_most)


def ratio(times: Times, above: str, below: str, **bar: Any) -> Ratio:
    """How many times as long one work takes as another."""
    return spread([mine / theirs for mine, theirs in zip(times[above], times[below])], **bar)


def milliseconds(times: Times, name: str) -> float:
    """Median of one work."""
    return statistics.median(times[name]) * 1e3


def measure(works: dict[str, Work], args: argparse.Namespace) -> Times:
    """Time each work in turn, in the opposite order every other time; short ones are called several times."""
    calls, times = {}, {name: [] for name in works}
    for name, work in works.items():
        work()
        calls[name] = max(1, min(MOST_CALLS, round(SAMPLE / seconds(work, args.device))))
    for repetition in range(args.repetitions):
        for name in reversed(works) if repetition % 2 else works:
            work, number = works[name], range(calls[name])
            work()  # brings its weights and states back into the processor's caches
            total = seconds(lambda: [work() for _ in number], args.device)  # noqa: B023 - called at once
            times[name].append(total / len(number))
    return times


class Layer:
    """The mixer of a model with one layer."""

    def __init__(self, mixer: dict[str, Any], device: str, **sizes: Any) -> None:
        self.config, self.device = stack([mixer], **sizes), device
        self.model = HfMoeModel(self.config).eval().to(device)
        self.mixer: Any = self.model.layers[0].self_attn

    def cache(self) -> DynamicCache:
        """An empty cache."""
        return DynamicCache(config=self.config)

    def read(self, cache: Any, length: int = 1) -> Work:
        """A call that reads this many more tokens; all that does not belong to the mixer is done beforehand."""
        hidden_states = torch.randn(1, length, WIDTH, device=self.device)
        positions = torch.arange(length, device=self.device)[None] + cache.get_seq_length()
        inputs = {"position_embeddings": self.model.rotary_emb(hidden_states, positions), "position_ids": positions}
        return lambda: self.mixer(hidden_states, past_key_values=cache, **inputs)[0]

    def filled(self, length: int) -> Any:
        """A cache of a recurrent layer that has seen this many tokens."""
        cache = self.cache()
        while (missing := length - cache.get_seq_length()) > 0:
            self.read(cache, min(missing, 2048))()
        return cache


class FixedKeys:
    """Keys and values (1, H, S, d) of a softmax layer in one place; a step overwrites the last token."""

    def __init__(self, *keys_and_values: torch.Tensor) -> None:
        self.held = keys_and_values

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """What a cache does, without a copy."""
        for held, new in zip(self.held, (key, value)):
            held[:, :, -1:] = new
        return self.held

    def get_seq_length(self) -> int:
        """Tokens before the one to come."""
        return self.held[0].shape[2] - 1


def stack(mixers: list[dict[str, Any]], **sizes: Any) -> HfMoeConfig:
    """Config of a model of these mixers and nothing else."""
    blocks = {str(number): {"type": "mixer_only", "mixer": mixer} for number, mixer in enumerate(mixers)}
    common = {"vocab_size": 8, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": len(mixers)}
    return HfMoeConfig(**{**common, **sizes}, blocks=blocks)


def softmax_caches(layer: Layer, length: int) -> tuple[DynamicCache, FixedKeys]:
    """Equal random keys and values in both."""
    size = (1, layer.config.num_key_value_heads or HEADS, length, HEAD_DIM)
    keys, values = (torch.randn(size, device=layer.device) for _ in range(2))
    cache = layer.cache()
    cache.update(keys, values, 0)
    return cache, FixedKeys(keys, values)


def decoding(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One token after a long context and after a short one."""
    works: dict[str, dict[str, Work]] = {"short": {}, "long": {}}
    weights = {}
    for name in RECURRENT:
        layer = Layer({"type": name}, args.device)
        caches = layer.filled(SHORT), layer.filled(LONG)
        works["short"][name], works["long"][name] = map(layer.read, caches)
        weights[name] = cache_memory(caches[1])
    for suffix, heads in (("", HEADS), (", 1 key head", 1)):
        layer = Layer({"type": "attention"}, args.device, num_key_value_heads=heads)
        for context, length in (("short", SHORT), ("long", LONG)):
            cache, fixed = softmax_caches(layer, length)
            works[context][f"attention{suffix}"] = layer.read(cache)
            works[context][f"attention, fixed{suffix}"] = layer.read(fixed)
        weights[f"attention{suffix}"] = weights[f"attention, fixed{suffix}"] = cache_memory(cache)
    flat = {f"{name} {context}": works[context][name] for name in works["short"] for context in works}
    times, rows = measure(flat, args), []
    for name in works["short"]:
        is_softmax = name not in RECURRENT
        row = {
            "layer": name,
            "1k, ms": milliseconds(times, f"{name} short"),
            "32k, ms": milliseconds(times, f"{name} long"),
            "32k / 1k, bar 1.2": ratio(
                times, f"{name} long", f"{name} short", bar=None if is_softmax else 1.2, at_most=True
            ),
            "attention / this at 32k, bar 5": ratio(
                times, "attention long", f"{name} long", bar=None if is_softmax else 5
            ),
            "attention, fixed / this": ratio(times, "attention, fixed long", f"{name} long"),
            "cache at 32k, KiB": (weights[name].per_token * LONG + weights[name].per_sequence) / 1024,
        }
        rows.append(row)
    show(f"decoding: one token of one layer, after {SHORT} and after {LONG} tokens", rows)
    return rows


def deepseek_layer(ours: torch.nn.Module, device: str) -> DeepseekV3Attention:
    """Transformers' latent attention with our weights."""
    widths = {name: LATENT[name] for name in LATENT if name != "type"}
    config = DeepseekV3Config(hidden_size=WIDTH, num_attention_heads=HEADS, q_lora_rank=None, **widths)
    config._attn_implementation = "sdpa"
    native = DeepseekV3Attention(config, 0).eval().to(device)
    native.load_state_dict(ours.state_dict())
    return native


def latent(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One token of latent attention by both ways, and by Transformers' only one."""
    layers = {"absorbed": Layer(LATENT, args.device), "expanded": Layer(LATENT, args.device)}
    ours = layers["absorbed"].mixer
    layers["expanded"].mixer.load_state_dict(ours.state_dict())
    layers["expanded"].mixer.absorbs = lambda *_: False
    widths = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
    filling = [torch.randn(1, 1, LATENT_CONTEXT, width, device=args.device) for width in widths]
    hidden_states = torch.randn(1, 1, WIDTH, device=args.device)
    positions = torch.tensor([[LATENT_CONTEXT]], device=args.device)
    inputs = {"position_embeddings": ours.rotary_emb(hidden_states, positions), "position_ids": positions}
    works, modules = {}, {name: layer.mixer for name, layer in layers.items()}
    for name, module in {**modules, "transformers": deepseek_layer(ours, args.device)}.items():
        cache = layers["absorbed"].cache()
        cache.update(*filling, 0)
        works[name] = lambda module=module, cache=cache: module(
            hidden_states, attention_mask=None, past_key_values=cache, **inputs
        )[0]
    outputs = [work() for work in works.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-4)
    times = measure(works, args)
    rows = [
        {
            "layer": f"latent_attention, {name}",
            "8k, ms": milliseconds(times, name),
            "this / absorbed": ratio(times, name, "absorbed", bar=None if name == "absorbed" else 3),
        }
        for name in works
    ]
    show(f"latent: one token of one layer after {LATENT_CONTEXT} tokens, bar 3", rows)
    return rows


class CountedOps(TorchDispatchMode):
    """Counts the tensor operations that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(work: Work) -> int:
    """How many tensor operations a call takes."""
    with CountedOps() as mode:
        work()
    return mode.count


def minimax_layer(ours: Any, device: str) -> MiniMaxLightningAttention:
    """Transformers' lightning attention with our weights."""
    config = MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    native = MiniMaxLightningAttention(config, 0).eval().to(device)
    parts = [getattr(ours, f"{name}_proj").weight.unflatten(0, (HEADS, HEAD_DIM)) for name in "qkv"]
    native.qkv_proj.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
    for mine, theirs in ((ours.o_proj, native.out_proj), (ours.g_proj, native.output_gate), (ours.norm, native.norm)):
        theirs.weight.copy_(mine.weight)
    return native


def reading(layer: Layer, native: torch.nn.Module, length: int, known: int) -> dict[str, Work]:
    """Read `length` tokens after `known` others, by both sides."""
    hidden_states = torch.randn(1, length, WIDTH, device=layer.device)
    start = torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM, device=layer.device)

    def ours() -> torch.Tensor:
        cache = layer.cache()
        if known:
            cache.layers[0].store((start,), (hidden_states[:, :0], None))  # pyright: ignore
        return layer.mixer(hidden_states, None, past_key_values=cache)[0]

    def transformers() -> torch.Tensor:
        cache = MiniMaxCache()
        if known:
            cache.set_linear_cache(0, start)
        return native(hidden_states, None, None, past_key_values=cache)[0]

    return {"ours": ours, "transformers": transformers}


def slope(times: Times) -> Ratio:
    """Least-squares slope of log time over log length: 1 is linear."""
    logs = [math.log(length) for length in PREFILLS]
    columns = zip(*(times[str(length)] for length in PREFILLS))
    slopes = [statistics.linear_regression(logs, [math.log(x) for x in column]).slope for column in columns]
    return spread(slopes, bar=1.1, at_most=True)


def prefill(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A prompt through lightning attention, and the next 512 tokens: time and operations per token."""
    layer = Layer({"type": "lightning_attention"}, args.device)
    native = minimax_layer(layer.mixer, args.device)
    step = layer.read(layer.filled(8))
    cases = {f"prompt of {length}": reading(layer, native, length, 0) for length in PREFILLS}
    cases["512 more tokens"] = reading(layer, native, 512, SHORT)
    rows, ours = [], {}
    for name, works in cases.items():
        length = int(name.split()[0] if name[0].isdigit() else name.split()[-1])
        torch.testing.assert_close(works["ours"](), works["transformers"](), atol=1e-4, rtol=1e-3)
        times = measure({**works, "step": step}, args)
        ours[str(length)] = times["ours"]
        rows.append(
            {
                "lightning_attention": name,
                "ours, us/token": milliseconds(times, "ours") * 1e3 / length,
                "transformers, us/token": milliseconds(times, "transformers") * 1e3 / length,
                "transformers / ours": ratio(times, "transformers", "ours"),
                "token by token / ours": spread([length * b / a for a, b in zip(times["ours"], times["step"])]),
                "ours, operations": operations(works["ours"]),
                "transformers, operations": operations(works["transformers"]),
            }
        )
    show("prefill: lightning attention", rows)
    counts = [operations(reading(layer, native, length, 0)["ours"]) for length in (1024, 4096, 1025, 1087)]
    more = (counts[1] - counts[0]) / (4096 - 1024)
    print(f"log-log slope of time over length, bar 1.1: {slope(ours)}")
    print(f"operations: {counts[0]} at 1024, {counts[1]} at 4096 ({more:.3f} per token); {counts[2:]} at 1025 and 1087")
    summary = {"slope": slope(ours), "operations per token": Ratio(more, more, more, 0.1, True)}
    return [*rows, summary]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes that the caches of hybrid stacks hold, measured on filled ones."""
    rows = []
    for name, pattern in STACKS.items():
        mixers = [LATENT if mixer == LATENT["type"] else {"type": mixer} for mixer in pattern * (8 // len(pattern))]
        config = stack(mixers, num_key_value_heads=1 if "1 key head" in name else HEADS)
        model = HfMoeModel(config).eval().to(args.device)
        outputs: Any = model(torch.zeros(1, 64, dtype=torch.long, device=args.device), use_cache=True)
        held = cache_memory(outputs.past_key_values)
        total = held.per_token * LONG + held.per_sequence
        rows.append(
            {
                "8 layers": name,
                "bytes per token": held.per_token,
                "bytes per sequence": held.per_sequence,
                "at 32k, MiB": total / 2**20,
                "of attention only": total / (rows[0]["at 32k, MiB"] * 2**20) if rows else 1.0,
            }
        )
    show(f"memory: caches in fp32, after {LONG} tokens", rows)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    lines = [list(rows[0]), *([written(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths))))


def written(value: Any) -> str:
    """As it stands in a table."""
    return f"{value:.{3 if value < 100 else 0}f}" if isinstance(value, float) else str(value)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """As it stands in a file."""
    return {name: {**x._asdict(), "met": x.met} if isinstance(x, Ratio) else x for name, x in row.items()}


SECTIONS = {"decoding": decoding, "latent": latent, "prefill": prefill, "memory": memory}


@torch.no_grad()
def main() -> None:
    """Run the sections that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = {"torch": torch.__version__, "threads": args.threads, "device": args.device}
    print(f"torch {torch.__version__}, {args.threads} threads, {args.device}: fp32, 1 row, width {WIDTH}, {HEADS} heads")
    results = {name: [plain(row) for row in SECTIONS[name](args)] for name in args.sections or SECTIONS}
    if args.json:
        args.json.write_text(json.dumps({**about, "sections": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
