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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, DynamicCache, MiniMaxConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from hf_moe import CacheMemory, HfMoeConfig, HfMoeModel, cache_memory
from hf_moe.modeling.packing import Rows

from .feed_forward import seconds

WIDTH, HEADS, HEAD_DIM = 512, 4, 128
CONTEXTS = {"1k": 1024, "32k": 32 * 1024}  # tokens in the cache
GROWTH, GAIN = 1.2, 5  # of a recurrent step at 32k: how much slower than at 1k, how much faster than attention
LATENT_CONTEXT, LATENT_GAIN = 8 * 1024, 3
PREFILLS, CONTINUATION = [1024, 2048, 4096, 8192, 16384], 512
LINEAR = 1.2  # slope of time over length: what no longer fits into the processor's caches costs more; 2 is quadratic
MORE_OPERATIONS = 0.25  # per token: the shortest loop over tokens has several
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
    low, median, high = statistics.quantiles(values, n=4)
    return Ratio(low, median, high, bar, at_most)


def ratio(times: Times, above: str, below: str, bar: float | None = None, at_most: bool = False) -> Ratio:
    """How many times as long one work takes as another."""
    return spread([mine / theirs for mine, theirs in zip(times[above], times[below])], bar, at_most)


def milliseconds(times: Times, name: str) -> float:
    """Median of one work."""
    return statistics.median(times[name]) * 1e3


def measure(works: dict[str, Work], args: argparse.Namespace, most: int = 1000) -> Times:
    """Time each work in turn, in the opposite order every other time; short ones are called several times."""
    calls, times = {}, {name: [] for name in works}
    for name, work in works.items():
        work()
        calls[name] = max(1, min(MOST_CALLS, round(SAMPLE / seconds(work, args.device))))
    for repetition in range(min(most, args.repetitions)):
        for name in reversed(works) if repetition % 2 else works:
            work = works[name]
            if calls[name] > 1:
                work()  # brings its weights and states back into the processor's caches
            times[name].append(seconds(partial(repeat, work, calls[name]), args.device) / calls[name])
    return times


def repeat(work: Work, number: int) -> None:
    """Call it so often."""
    for _ in range(number):
        work()


class Layer:
    """The mixer of a model with one layer."""

    def __init__(self, mixer: dict[str, Any], device: str, **sizes: Any) -> None:
        self.config, self.device = stack([mixer], **sizes), device
        self.model: Any = HfMoeModel(self.config)
        self.mixer: Any = self.model.eval().to(device).layers[0].self_attn

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


def decoding_layers(device: str) -> tuple[dict[str, Work], dict[str, CacheMemory]]:
    """Steps of every layer after each context, and what a token and a sequence take in its cache."""
    works, held = {}, {}
    for name in RECURRENT:
        layer = Layer({"type": name}, device)
        for context, length in CONTEXTS.items():
            cache = layer.filled(length)
            works[f"{name} {context}"], held[name] = layer.read(cache), cache_memory(cache)
    for suffix, heads in (("", HEADS), (", 1 key head", 1)):
        layer = Layer({"type": "attention"}, device, num_key_value_heads=heads)
        for context, length in CONTEXTS.items():
            cache, fixed = softmax_caches(layer, length)
            works[f"attention{suffix} {context}"] = layer.read(cache)
            works[f"attention, fixed{suffix} {context}"] = layer.read(fixed)
            held[f"attention{suffix}"] = held[f"attention, fixed{suffix}"] = cache_memory(cache)
    return works, held


@torch.no_grad()
def decoding(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One token after a long context and after a short one."""
    works, held = decoding_layers(args.device)
    times, rows = measure(works, args), []
    for name, weight in held.items():
        short, long = f"{name} 1k", f"{name} 32k"
        growth, gain = (GROWTH, GAIN) if name in RECURRENT else (None, None)
        row = {
            "layer": name,
            "1k, ms": milliseconds(times, short),
            "32k, ms": milliseconds(times, long),
            f"32k / 1k, bar {GROWTH}": ratio(times, long, short, growth, at_most=True),
            f"attention / this at 32k, bar {GAIN}": ratio(times, "attention 32k", long, gain),
            "attention, fixed / this": ratio(times, "attention, fixed 32k", long),
            "cache at 32k, KiB": (weight.per_token * CONTEXTS["32k"] + weight.per_sequence) / 1024,
        }
        rows.append(row)
    show("decoding: one token of one layer after 1k and after 32k tokens", rows)
    return rows


def deepseek_layer(ours: torch.nn.Module, device: str) -> DeepseekV3Attention:
    """Transformers' latent attention with our weights."""
    widths = {name: LATENT[name] for name in LATENT if name != "type"}
    config = DeepseekV3Config(hidden_size=WIDTH, num_attention_heads=HEADS, q_lora_rank=None, **widths)
    config._attn_implementation = "sdpa"
    native = DeepseekV3Attention(config, 0).eval().to(device)
    native.load_state_dict(ours.state_dict())
    return native


@torch.no_grad()
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
        cache: Any = layers["absorbed"].cache()
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
            "this / absorbed": ratio(times, name, "absorbed", None if name == "absorbed" else LATENT_GAIN),
        }
        for name in works
    ]
    show(f"latent: one token of one layer after 8k tokens, bar {LATENT_GAIN}", rows)
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


def reading(layer: Layer, native: torch.nn.Module, length: int, continues: bool = False) -> dict[str, Work]:
    """Read `length` tokens from the start or from some state, by both sides."""
    hidden_states = torch.randn(1, length, WIDTH, device=layer.device)
    start = torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM, device=layer.device)

    def ours() -> torch.Tensor:
        cache = layer.cache()
        if continues:
            cache.layers[0].store((start,), (hidden_states[:, :0], Rows()))  # pyright: ignore
        return layer.mixer(hidden_states, None, past_key_values=cache)[0]

    def transformers() -> torch.Tensor:
        cache = MiniMaxCache()
        if continues:
            cache.set_linear_cache(0, start)
        return native(hidden_states, None, None, past_key_values=cache)[0]

    return {"ours": ours, "transformers": transformers}


def slope(times: Times, side: str) -> Ratio:
    """Least-squares slope of log time over log length: 1 is linear."""
    logs = [math.log(length) for length in PREFILLS]
    columns = zip(*(times[f"{side}, prompt of {length}"] for length in PREFILLS))
    slopes = [statistics.linear_regression(logs, [math.log(x) for x in column]).slope for column in columns]
    return spread(slopes, bar=LINEAR, at_most=True)


@torch.no_grad()
def prefill(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A prompt through lightning attention, and a continuation: time and operations per token."""
    layer = Layer({"type": "lightning_attention"}, args.device)
    native = minimax_layer(layer.mixer, args.device)
    cases = {f"prompt of {length}": (length, reading(layer, native, length)) for length in PREFILLS}
    cases[f"{CONTINUATION} more tokens"] = CONTINUATION, reading(layer, native, CONTINUATION, continues=True)
    tolerance = 1e-4 if args.device == "cpu" else 1e-2  # kernels multiply in TF32
    for _, works in cases.values():
        torch.testing.assert_close(works["ours"](), works["transformers"](), atol=tolerance, rtol=10 * tolerance)
    flat: dict[str, Work] = {
        f"{side}, {name}": work for name, (_, works) in cases.items() for side, work in works.items()
    }
    times = measure({**flat, "step": layer.read(layer.filled(8))}, args, most=7)
    rows = []
    for name, (length, works) in cases.items():
        row: dict[str, Any] = {"lightning_attention": name}
        for side, work in works.items():
            row[f"{side}, us/token"] = milliseconds(times, f"{side}, {name}") * 1e3 / length
            row[f"{side}, operations"] = operations(work)
        row["transformers / ours"] = ratio(times, f"transformers, {name}", f"ours, {name}")
        alone = [length * step / ours for step, ours in zip(times["step"], times[f"ours, {name}"])]
        rows.append({**row, "token by token / ours": spread(alone)})
    show("prefill: lightning attention", rows)
    return [*rows, growth(rows, times)]


def growth(rows: list[dict[str, Any]], times: Times) -> dict[str, Ratio]:
    """How time and operations grow with the prompt: neither may come from a loop over tokens."""
    first, last = rows[0], rows[len(PREFILLS) - 1]
    found = {}
    for side in ("ours", "transformers"):
        more = (last[f"{side}, operations"] - first[f"{side}, operations"]) / (PREFILLS[-1] - PREFILLS[0])
        found[f"{side}, log-log slope of time over length, bar {LINEAR}"] = slope(times, side)
        found[f"{side}, operations per more token, bar {MORE_OPERATIONS}"] = Ratio(
            more, more, more, MORE_OPERATIONS, True
        )
    for name, value in found.items():
        print(f"{name}: {value}")
    return found


@torch.no_grad()
def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes that the caches of hybrid stacks hold, measured on filled ones."""
    rows, tokens = [], torch.zeros(1, 64, dtype=torch.long, device=args.device)
    for name, pattern in STACKS.items():
        mixers = [LATENT if mixer == LATENT["type"] else {"type": mixer} for mixer in pattern * (8 // len(pattern))]
        config = stack(mixers, num_key_value_heads=1 if "1 key head" in name else HEADS)
        model: Any = HfMoeModel(config)
        held = cache_memory(model.eval().to(args.device)(tokens, use_cache=True).past_key_values)
        total = held.per_token * CONTEXTS["32k"] + held.per_sequence
        rows.append(
            {
                "8 layers": name,
                "bytes per token": held.per_token,
                "bytes per sequence": held.per_sequence,
                "at 32k, MiB": total / 2**20,
                "of attention only": total / (rows[0]["at 32k, MiB"] * 2**20) if rows else 1.0,
            }
        )
    show("memory: caches in fp32 after 32k tokens", rows)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    lines = [list(rows[0]), *([written(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line, widths)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def written(value: Any) -> str:
    """As it stands in a table."""
    return f"{value:.{3 if value < 100 else 0}f}" if isinstance(value, float) else str(value)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """As it stands in a file."""
    return {name: {**x._asdict(), "met": x.met} if isinstance(x, Ratio) else x for name, x in row.items()}


SECTIONS = {"decoding": decoding, "latent": latent, "prefill": prefill, "memory": memory}


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
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.device}: fp32, 1 row, width {WIDTH}, {HEADS} heads"
    )
    results = {name: [plain(row) for row in SECTIONS[name](args)] for name in args.sections or SECTIONS}
    if args.json:
        args.json.write_text(json.dumps({**about, "sections": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
