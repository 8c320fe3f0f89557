"""ComPEFT: an adapter as signs of its largest changes and one number (https://arxiv.org/abs/2311.13171, §2).

    tau = theta - theta_0;   tau' = alpha std(tau) sign(tau) for the `density` largest |tau|, 0 for the others

over all tensors of the adapter at once. On disk this takes near `-(1 - k) log2(1 - k) d - k log2(k / 2) d + 16` bits
for d numbers of density k: positions are Golomb coded, signs take a bit each.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .expert_files import new_folder
from .golomb import decode, encode

FILE, FORMAT = "compeft.safetensors", "hf_moe compeft 1"
CONFIG = "adapter_config.json"
NO_CHANGES = ("PST", "EXSSNET", "RAMT", "SMORA")  # their tensors are scores, masks and selection biases too


@dataclass(frozen=True)
class Compression:
    """What compressing did.

    Args:
        numbers: d, numbers in the adapter; kept: how many of them are not 0.
        original_bytes, compressed_bytes: of the files with the tensors.
        entropy_bytes: what signs and positions hold at least, if they are random.
        value: the absolute value of what is kept.
    """

    numbers: int
    kept: int
    original_bytes: int
    compressed_bytes: int
    entropy_bytes: float
    value: float

    @property
    def ratio(self) -> float:
        """Original size over compressed size."""
        return self.original_bytes / self.compressed_bytes


def compress_adapter(
    adapter: str | Path,
    out: str | Path,
    density: float = 0.2,
    alpha: float = 1.0,
    initial: str | Path | None = None,
) -> Compression:
    """Write a compressed copy of a saved adapter.

    Args:
        adapter: folder with `adapter_config.json` and `adapter_model.safetensors`, of any PEFT method.
        out: folder to write; it must not exist.
        density: part that is kept, exactly `int(density d)` numbers, the first of equal ones (the released code keeps
            one more). The paper tries 0.05 to 0.5.
        alpha: the paper tries 0.5 to 10, on validation data. Large models want less than small ones.
        initial: folder of the adapter as it was before training, theta_0; None: zeros. LoRA's A starts at random, so
            that without it tau is A itself.

    Raises:
        ValueError: numbers out of range; an adapter whose tensors are no changes, has none, holds NaN, or does not fit
            `initial`; an `out` that exists.
    """
    if not 0 < density <= 1 or alpha <= 0:
        raise ValueError(f"density={density} must be above 0 and at most 1, alpha={alpha} above 0.")
    folder = Path(adapter)
    config = json.loads((folder / CONFIG).read_text())
    whole = config.get("peft_type") == "ESFT" or config.get("modules_to_save")
    if config.get("peft_type") in NO_CHANGES or (whole and initial is None):
        raise ValueError(
            f"{adapter}: {config['peft_type']} with modules_to_save={config.get('modules_to_save')} is no change from "
            "zero: what learns whole (ESFT, modules_to_save) needs `initial`; masks and selection biases cannot be "
            "compressed."
        )
    tensors, start = load_file(folder / SAFETENSORS_WEIGHTS_NAME), starting_point(initial)
    layout = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())}
    if start is not None and {n: list(t.shape) for n, t in start.items()} != {n: s for n, (_, s) in layout.items()}:
        raise ValueError(f"{initial}: its tensors are not those of {adapter}.")
    change = flat(tensors, layout) if start is None else flat(tensors, layout) - flat(start, layout)
    if not np.isfinite(change).all():
        raise ValueError(f"{adapter}: holds NaN or infinite values.")
    if not (kept := int(density * len(change))):
        raise ValueError(f"density={density} keeps none of the {len(change)} numbers in {adapter}.")
    positions = largest(np.abs(change), kept)
    unary, low, shift = encode(positions)
    value = float(np.float32(alpha * change.std(ddof=1 if len(change) > 1 else 0)))
    facts = {"shift": shift, "kept": kept, "value": value, "density": density, "alpha": alpha, "layout": layout}
    facts |= {"initial": digest(initial)}
    parts = {"unary": unary, "low_bits": low, "signs": np.packbits(change[positions] > 0)}
    with new_folder(out) as draft:
        metadata = {"format": FORMAT, "facts": json.dumps(facts)}
        save_file({name: torch.from_numpy(part) for name, part in parts.items()}, draft / FILE, metadata)
        shutil.copy(folder / CONFIG, draft / CONFIG)
        size = (draft / FILE).stat().st_size
    original = (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return Compression(len(change), kept, original, size, entropy_bytes(len(change), kept / len(change)), value)


def decompress_adapter(folder: str | Path, out: str | Path, initial: str | Path | None = None) -> Path:
    """Write the adapter that a compressed one stands for: `theta_0 + tau'`, exactly.

    Args:
        folder: that `compress_adapter` wrote.
        out: folder to write, for `PeftModel.from_pretrained`; it must not exist.
        initial: the same adapter that it was compressed with.

    Raises:
        ValueError: a damaged file, another `initial`, an `out` that exists.
    """
    folder = Path(folder)
    facts, parts = read(folder / FILE)
    if facts["initial"] != digest(initial):
        wanted = "the initial adapter it was compressed with" if facts["initial"] else "no initial adapter"
        raise ValueError(f"{folder}: wants {wanted}; initial={initial!s} is another.")
    change = ternary(facts, parts) * np.float32(facts["value"])
    start, tensors, at = starting_point(initial), {}, 0
    for name, (dtype, shape) in facts["layout"].items():
        part = torch.from_numpy(change[at : at + prod(shape)]).view(shape)
        at += prod(shape)
        tensors[name] = (part if start is None else start[name].float() + part).to(getattr(torch, dtype))
    with new_folder(out) as draft:
        save_file(tensors, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        shutil.copy(folder / CONFIG, draft / CONFIG)
    return Path(out)


def ternary(facts: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(d,) -1, 0 and 1 of a compressed adapter, in float32."""
    total, kept = sum(prod(shape) for _, shape in facts["layout"].values()), facts["kept"]
    positions = decode(parts["unary"], parts["low_bits"], facts["shift"], kept)
    signs = np.unpackbits(parts["signs"])
    if len(signs) < kept or (kept and positions[-1] >= total):
        raise ValueError("The signs and positions do not fit the tensors: the file is damaged.")
    found = np.zeros(total, dtype=np.float32)
    found[positions] = 2.0 * signs[:kept] - 1.0
    return found


def largest(sizes: np.ndarray, number: int) -> np.ndarray:
    """Ascending positions of the largest numbers; of equal ones, the first."""
    bar = np.partition(sizes, len(sizes) - number)[len(sizes) - number]
    above, equal = np.flatnonzero(sizes > bar), np.flatnonzero(sizes == bar)
    return np.sort(np.concatenate([above, equal[: number - len(above)]]))


def entropy_bytes(numbers: int, density: float) -> float:
    """The paper's bound for d numbers, in bytes."""
    zeros = (1 - density) * log2(1 - density) if density < 1 else 0.0
    return (-zeros * numbers - density * log2(density / 2) * numbers + 16) / 8


def flat(tensors: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> np.ndarray:
    """All numbers in the order of the layout, in float32."""
    if wrong := [name for name in layout if not tensors[name].is_floating_point()]:
        raise ValueError(f"{wrong[0]!r} is {tensors[wrong[0]].dtype}: only adapters of floating-point numbers shrink.")
    return np.concatenate([tensors[name].float().flatten().numpy() for name in layout])


def starting_point(initial: str | Path | None) -> dict[str, torch.Tensor] | None:
    """The tensors of theta_0."""
    return None if initial is None else load_file(Path(initial) / SAFETENSORS_WEIGHTS_NAME)


def digest(initial: str | Path | None) -> str | None:
    """What tells one theta_0 from another."""
    return (
        None
        if initial is None
        else hashlib.sha256((Path(initial) / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
    )


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and coded parts of a compressed adapter.

    Raises:
        ValueError: no such file, or something else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no compressed adapter here.")
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{file}: is {metadata.get('format')!r}, not {FORMAT!r}.")
        return json.loads(metadata["facts"]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
