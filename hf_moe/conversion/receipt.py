"""`conversion.json`: what a mixture was made of and how, with the hashes that show it was not changed since.

No local path is in it: a local source is known by the name of its folder.
"""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .engine import Written
from .methods.base import Exactness
from .planning import Plan
from .sources import Source, first_line
from .tensor_files import sha256_of
from .verification import Measured, measure
from .workplace import write_json

RECEIPT = "conversion.json"
FORMAT = 1
FIELDS = ("format", "recipe", "versions", "sources", "shards", "parameters", "bytes", "exactness")
TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is smaller
ROUNDED = 5e-2  # the same, where weights were rounded to a half type


def certify(plan: Plan, folder: Path, written: Written, verify: bool = True) -> dict[str, Any]:
    """Write the receipt of a conversion into its folder; made to be called by `convert`'s `finish`.

    Args:
        plan: what was made.
        folder: where the files are now.
        written: what the engine says about them.
        verify: compare the result with each source; both are loaded whole. Sources in memory are left out.
    """
    total, active = plan.num_parameters()
    measured = [measure(source, folder) if verify and source.weights else None for source in plan.sources]
    receipt = {
        "format": FORMAT,
        "recipe": recipe_of(plan),
        "versions": {name: version(name) for name in ("hf_moe", "safetensors", "torch", "transformers")}
        | {"python": platform.python_version()},
        "sources": [
            identity_of(source) | {"shards": shards}
            for source, shards in zip(plan.sources, written.sources, strict=True)
        ],
        "shards": dict(sorted(written.shards.items())),
        "parameters": {"total": total, "active": active},
        "bytes": written.bytes,
        "exactness": exactness_of(plan, measured),
    }
    write_json(folder / RECEIPT, receipt)
    return receipt


def recipe_of(plan: Plan) -> dict[str, Any]:
    """The options that decided the result; `data` may be private, so only its use is told."""
    options = plan.options
    return {
        "target": options.target,
        "method": plan.method.name,
        "num_experts": plan.layout.num_experts,
        "top_k": plan.layout.top_k,
        "layers": list(plan.layout.layers),
        "router_init": options.router_init,
        "router_std": options.router_std,
        "calibrated_on_data": options.data is not None,
        "seed": options.seed,
        "dtype": str(plan.main_dtype).removeprefix("torch."),
        "method_options": options.method_options,
        "config_overrides": options.config_overrides,
    }


def identity_of(source: Source) -> dict[str, Any]:
    """A hub id and its commit, or the name of a folder, or a class."""
    if source.model is not None:
        return {"in_memory": type(source.model).__name__}
    if isinstance(source.weights, Path):
        return {"folder": source.weights.resolve().name}
    return {"hub_id": source.weights, "commit": getattr(source.config, "_commit_hash", None)}


def exactness_of(plan: Plan, measured: list[Measured | None]) -> dict[str, Any]:
    """What was promised, what was measured, and what is left of the promise."""
    promised = plan.guarantee.exactness
    limit = {Exactness.EXACT: TOLERANCE, Exactness.ROUNDING: ROUNDED}.get(promised)
    broken = limit is not None and any(
        found.max_logit_difference > limit * max(found.largest_logit, 1) for found in measured if found
    )
    return {
        "promised": promised.value,
        "reason": plan.guarantee.reason,
        "measured": [asdict(found) if found else None for found in measured],
        "level": (Exactness.APPROXIMATE if broken else promised).value,
    }


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
