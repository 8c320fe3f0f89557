"""`hf-moe env`: what is installed here, in a form that fits into a bug report."""

import json
import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "hf_moe"
PACKAGES = (  # what decides how a model behaves; the optional ones come last
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "trl",
    "flash-attn",
    "flash-linear-attention",
    "kernels",
    "triton",
)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, accelerators, optional extras and registered architectures.

    Nothing personal is in it: no paths, no host name, no environment variables, no tokens.

    Examples:

        hf-moe env

        hf-moe env --json > environment.json
    """
    facts = collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))


def collect() -> dict[str, Any]:
    """Everything that the command prints."""
    from ..architectures import ARCHITECTURES
    from ..published import PUBLISHED

    return {
        "versions": {
            DISTRIBUTION: installed(DISTRIBUTION),
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            **{package: installed(package) for package in PACKAGES},
        },
        "accelerators": accelerators(),
        "extras": extras(),
        "architectures": sorted(ARCHITECTURES),
        "public checkpoints": sorted(PUBLISHED),
    }


def installed(package: str) -> str | None:
    """The version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def accelerators() -> list[str]:
    """One line for each device that torch can use beside the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    if kind.type != "cuda":
        return [kind.type] * torch.accelerator.device_count()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {runtime}" for device in devices]


def extras() -> dict[str, list[str]]:
    """For each optional extra of the package, what it lacks here."""
    from packaging.requirements import Requirement

    optional = [item for item in map(Requirement, requires(DISTRIBUTION) or []) if item.marker]
    return {
        extra: [
            f"{item.name}{item.specifier}"
            for item in optional
            if item.marker and item.marker.evaluate({"extra": extra}) and not satisfied(item)
        ]
        for extra in metadata(DISTRIBUTION).get_all("Provides-Extra", [])
    }


def satisfied(requirement: "Requirement") -> bool:
    """Whether a package is installed in a version that will do."""
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def as_text(facts: dict[str, Any]) -> str:
    """The facts in two columns."""
    rows = [(name, found or "not installed") for name, found in facts["versions"].items()]
    rows += [("accelerators", device) for device in facts["accelerators"] or ["none, torch runs on the CPU"]]
    for extra, lacks in facts["extras"].items():
        advice = f"missing {', '.join(lacks)}; pip install '{DISTRIBUTION}[{extra}]'"
        rows.append((f"extra {extra}", advice if lacks else "installed"))
    for kind in ("architectures", "public checkpoints"):
        rows.append((kind, f"{len(facts[kind])}: {', '.join(facts[kind])}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
