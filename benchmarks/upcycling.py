"""Our conversion next to `cp` of the bytes that it writes, and next to mergekit-moe where that is installed.

    python -m benchmarks.upcycling                                 a source of 0.5 GB, 8 experts
    python -m benchmarks.upcycling --source-gb 2 --experts 8       needs 45 GB of disk with mergekit, 30 GB without
    python -m benchmarks.upcycling --without-hashes                what SHA-256 of every file costs

Every contestant is a process of its own, timed from its start to the end of a `sync` of its files: imports count. `cp`
copies the folder that we have just written. Repetitions are interleaved, so that a slow minute of the machine meets
all; ratios are taken round by round. Memory is the most that a process ever held (VmHWM), mapped files included.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

WIDTH, EXPERT_WIDTH, VOCABULARY, SHARD_BYTES = 2048, 8192, 32000, 500_000_000
CONVERT = "from hf_moe.conversion import upcycle; upcycle({source!r}, 'mixtral', num_experts={experts}, output={out!r}"
CONVERT += ", verify=False)"  # neither of the others compares the result with its source
PLAIN = "from hf_moe.conversion import tensor_files; tensor_files.hashlib.sha256 = type('Not', (), "
PLAIN += "{'update': lambda *_: None, 'hexdigest': lambda _: ''}); "


@dataclass(frozen=True)
class Cost:
    """What one run of a contestant took."""

    seconds: float
    peak: int  # bytes


def make_source(folder: Path, gigabytes: float) -> None:
    """A Llama of about that size with noise for weights, in several files, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from hf_moe.conversion.tensor_files import ShardWriter, shard_names, split_into_shards

    layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * EXPERT_WIDTH)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer)),
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(folder)
    vocabulary = {str(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    shapes = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in state.items()}
    shards = split_into_shards(shapes, SHARD_BYTES)
    weight_map = {}
    for file, names in zip(shard_names(len(shards)), shards):
        weight_map |= dict.fromkeys(names, file)
        with ShardWriter(folder / file, {name: shapes[name] for name in names}) as shard:
            for name in names:
                shard.add(name, torch.randn(shapes[name][0]).mul_(0.02).bfloat16())
        shard.close()
    index = {
        "metadata": {"total_size": sum(2 * tensor.numel() for tensor in state.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(command: list[str], output: Path) -> Cost:
    """Start a process, wait for it and for the disk, and throw its output away unless it is ours."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.02)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command[0]} failed:\n{log.read().decode()[-3000:]}")
    for file in output.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return Cost(time.perf_counter() - start, peak)


def peak_of(process: int) -> int:
    """The most memory that a running process has held so far; 0 between its end and our noticing."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def contestants(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Name -> command; each writes to a folder of its own name."""
    source = str(folder / "source")
    code = (PLAIN if args.without_hashes else "") + CONVERT.format(
        source=source, experts=args.experts, out=str(folder / "ours")
    )
    found = {
        "ours": [sys.executable, "-c", code],
        "cp": ["cp", "-r", str(folder / "ours"), str(folder / "cp")],
    }
    if importlib.util.find_spec("mergekit") is not None:
        experts = [{"source_model": source, "positive_prompts": [str(number)]} for number in range(args.experts)]
        recipe = {"base_model": source, "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
        (folder / "mergekit.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        flags = ["--i-understand-this-is-not-useful-without-training", "--quiet"]
        program = [sys.executable, "-m", "mergekit.scripts.moe"]
        found["mergekit"] = [*program, str(folder / "mergekit.yaml"), str(folder / "mergekit"), *flags]
    return found


def report(costs: dict[str, list[Cost]], num_bytes: int) -> None:
    """Medians with quartiles, and ours as a ratio to the others, round by round."""
    for name, found in costs.items():
        low, median, high = quartiles([cost.seconds for cost in found])
        peak = statistics.median(cost.peak for cost in found)
        line = f"{name:<10} {median:7.2f} s [{low:.2f}, {high:.2f}]   {num_bytes / median / 1e6:6.0f} MB/s"
        line += f"   peak memory {peak / 1e6:7.0f} MB"
        if name != "ours":
            low, median, high = quartiles([ours.seconds / other.seconds for ours, other in zip(costs["ours"], found)])
            memory = statistics.median(ours.peak / other.peak for ours, other in zip(costs["ours"], found))
            line += f"   ours / {name}: time {median:.3f} [{low:.3f}, {high:.3f}], memory {memory:.2f}"
        print(line)


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def main() -> None:
    """Make a source, run everybody on it in turns, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-gb", type=float, default=0.5)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--without-hashes", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="upcycling-", dir=args.folder))
    try:
        (folder / "source").mkdir()
        make = "import sys, pathlib; from benchmarks.upcycling import make_source;"
        make += "make_source(pathlib.Path(sys.argv[1]), float(sys.argv[2]))"  # our own memory must stay small
        subprocess.run([sys.executable, "-c", make, str(folder / "source"), str(args.source_gb)], check=True)
        costs: dict[str, list[Cost]] = {name: [] for name in contestants(args, folder)}
        num_bytes = 0
        for _ in range(args.repetitions):
            for name, command in contestants(args, folder).items():
                costs[name].append(run(command, folder / name))
                num_bytes = num_bytes or sum(file.stat().st_size for file in (folder / name).iterdir())
                if name != "ours":
                    shutil.rmtree(folder / name)
            shutil.rmtree(folder / "ours")
        print(f"{args.source_gb} GB -> {num_bytes / 1e9:.2f} GB, {args.experts} experts, {args.repetitions} rounds")
        report(costs, num_bytes)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
