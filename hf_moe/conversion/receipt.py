"""`conversion.json`: what a mixture was made of and how, with the hashes that show it was not changed since.

No local path is in it: a local source is known by the name of its folder.
"""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .engine import Written
from .methods.base import Exactness
from .planning import Plan
from .rounding import HALVES
from .sources import Source, first_line, license_of
from .tensor_files import sha256_of
from .verification import Comparison, Measured, compare
from .workplace import write_json

RECEIPT = "conversion.json"
FORMAT = 2
FIELDS = ("format", "recipe", "versions", "sources", "shards", "parameters", "bytes", "exactness")
TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is smaller
ROUNDINGS = 2  # a weight is rounded at most twice: where a factor is folded into it, and where it is stored
USEFUL_KL = 0.1  # nats per token: the perplexity of the source's own text rises by a tenth


def certify(plan: Plan, folder: Path, written: Written, verify: bool = True, **training: Any) -> dict[str, Any]:
    """Write the receipt of a conversion into its folder; made to be called by `convert`'s `finish`.

    Args:
        plan: what was made.
        folder: where the files are now.
        written: what the engine says about them.
        verify: compare the result with each source, layer by layer.
        training: of the routers, if any (`router_steps`, `router_learning_rate`).
    """
    total, active = plan.num_parameters()
    kinds = {dtype for _, dtype in plan.shapes.values()} | {source.dtype for source in plan.sources}
    unit = rounding_unit(plan.guarantee.exactness, kinds)
    receipt = {
        "format": FORMAT,
        "recipe": recipe_of(plan) | training,
        "versions": {name: version(name) for name in ("hf_moe", "safetensors", "torch", "transformers")}
        | {"python": platform.python_version()},
        "sources": [
            identity_of(source) | {"license": license_of(source), "shards": shards}
            for source, shards in zip(plan.sources, written.sources, strict=True)
        ],
        "shards": dict(sorted(written.shards.items())),
        "parameters": {"total": total, "active": active},
        "bytes": written.bytes,
        "exactness": exactness_of(
            plan.guarantee.exactness,
            plan.guarantee.reason,
            compare(plan.sources, folder, unit=unit) if verify else None,
        ),
    }
    write_json(folder / RECEIPT, receipt)
    return receipt


def recipe_of(plan: Plan) -> dict[str, Any]:
    """The options that decided the result, as they were understood; of `data`, which may be private, only its use."""
    options, layout = plan.options, plan.layout
    return {
        "target": options.target,
        "method": plan.method.name,
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
        "expert_width": layout.expert_width,
        "granularity": options.granularity,
        "shared_experts": layout.num_shared,
        "layers": list(layout.layers),
        "normalize": layout.normalize,
        "router_init": options.router_init,
        "router_std": options.router_std,
        "calibrated_on_data": options.data is not None,
        "seed": options.seed,
        "dtype": str(plan.main_dtype).removeprefix("torch."),
        "method_options": {name: getattr(plan.method, name) for name in plan.method.options()},
        "config_overrides": options.config_overrides,
    }


def identity_of(source: Source) -> dict[str, Any]:
    """A hub id and its commit, or the name of a folder, or a class."""
    if source.model is not None:
        return {"in_memory": type(source.model).__name__}
    if isinstance(source.weights, Path):
        return {"folder": source.weights.resolve().name}
    assert source.folder is not None  # the hub's cache has a folder per commit, named after it
    return {"hub_id": source.weights, "commit": source.folder.name}


def rounding_unit(promised: Exactness, kinds: Iterable[torch.dtype | None]) -> float:
    """The share by which rounding to 16 bits makes a weight wrong at most, where that was promised; 0 elsewhere.

    Args:
        promised: of the result.
        kinds: types of its tensors and of its sources'.
    """
    if promised is not Exactness.ROUNDING:
        return 0.0
    return max((torch.finfo(dtype).eps / 2 for dtype in kinds if dtype in HALVES), default=0.0)


def tolerance_of(promised: Exactness, found: Comparison | None) -> dict[str, float]:
    """The figures that a promise limits: the largest difference of logits of exact results; of rounded ones the mean,
    to `ROUNDINGS` times what rounding does to the source itself. Empty if nothing was promised or measured."""
    if found and promised is Exactness.EXACT:
        return {"max_logit_difference": TOLERANCE * max(found.measured[0].largest_logit, 1)}
    if found and found.rounding and promised is Exactness.ROUNDING:
        return {"mean_logit_difference": ROUNDINGS * found.rounding.mean_logit_difference}
    return {}


def exactness_of(promised: Exactness, reason: str, found: Comparison | None) -> dict[str, Any]:
    """What was promised, what was measured, what is left of the promise, and what that means for use."""
    measured, tolerance = found.measured if found else [], tolerance_of(promised, found)
    broken = any(getattr(each, figure) > most for each in measured for figure, most in tolerance.items())
    level = Exactness.APPROXIMATE if broken else promised
    return {
        "promised": promised.value,
        "reason": reason,
        "tolerance": tolerance,
        "probe": found.probe if found else None,
        "measured": [asdict(each) for each in measured],
        "expert_load": found.expert_load if found else None,
        "level": level.value,
        "useful_without_training": is_useful(level, measured),
    }


def is_useful(level: Exactness, measured: Sequence[Measured]) -> bool | None:
    """Whether the result can be used as it is: exact ones can, those that need training cannot, and approximate ones
    can if they were measured to be within `USEFUL_KL` of every source; None if nobody measured."""
    if level in (Exactness.EXACT, Exactness.ROUNDING):
        return True
    if level is Exactness.NEEDS_TRAINING:
        return False
    return all(each.kl <= USEFUL_KL for each in measured) if measured else None


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt in a folder.

    Raises:
        ValueError: there is none, or it is not one that this version writes.
    """
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: cannot read {RECEIPT}: {first_line(error)}") from error
    if not isinstance(receipt, dict) or receipt.get("format") != FORMAT:
        raise ValueError(f"{folder / RECEIPT} is no receipt of format {FORMAT}")
    if missing := [name for name in FIELDS if name not in receipt]:
        raise ValueError(f"{folder / RECEIPT} lacks {missing}")
    return receipt


def changed_files(folder: Path) -> list[str]:
    """What differs between a folder and its receipt: one line per weight file; empty if nothing does."""
    shards = read_receipt(folder)["shards"]
    found = {file.name for file in folder.glob("*.safetensors")}
    lines = [f"{name}: missing" for name in sorted(shards.keys() - found)]
    lines += [f"{name}: not in the receipt" for name in sorted(found - shards.keys())]
    changed = [name for name in sorted(found & shards.keys()) if sha256_of(folder / name) != shards[name]]
    return lines + [f"{name}: its SHA-256 is not that of the receipt" for name in changed]
