"""What a folder knows about how its model was made: the receipt of a conversion, the log of a training."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

RECEIPT = "conversion.json"
TRAINING = "trainer_state.json"
RESULTS = ("eval_results.json", "all_results.json")
USE = {
    True: "It can be used as it is.",
    False: "**It is not useful without training:** fine-tune it before you use it.",
    None: "**Nobody has measured whether it is useful without training.**",
}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def source_names(receipt: dict[str, Any]) -> list[str]:
    """What a mixture was made from, as far as others may know it."""
    return [entry.get("hub_id") or entry.get("folder") or entry["in_memory"] for entry in receipt["sources"]]


def conversion(receipt: dict[str, Any]) -> dict[str, Any]:
    """What the card says about a conversion."""
    recipe, exactness = receipt["recipe"], receipt["exactness"]
    return {
        "names": source_names(receipt),
        "method": recipe["method"],
        "num_experts": recipe["num_experts"],
        "top_k": recipe["top_k"],
        "level": exactness["level"],
        "reason": exactness["reason"],
        "promised": exactness["promised"],
        "use": USE[exactness["useful_without_training"]],
        "compared": compared(source_names(receipt), exactness),
        "recipe": yaml.safe_dump(recipe, sort_keys=False).strip(),
        "hashes": hashes(receipt),
        "versions": ", ".join(f"{package} {version}" for package, version in receipt["versions"].items()),
    }


def compared(names: list[str], exactness: dict[str, Any]) -> str:
    """A table with a row per source."""
    if not exactness["measured"]:
        return "Not measured."
    probe = exactness["probe"]
    lines = [
        f"In float32, on {probe['tokens']} tokens ({probe['kind']}):\n",
        "| source | largest difference of logits | of a largest logit of | KL, nats per token | same next token |",
        "|---|---|---|---|---|",
    ]
    for name, found in zip(names, exactness["measured"], strict=True):
        figures = f"{found['max_logit_difference']:.1e} | {found['largest_logit']:.1f} | {found['kl']:.1e}"
        lines.append(f"| {name} | {figures} | {found['agreement']:.1%} |")
    return "\n".join(lines)


def hashes(receipt: dict[str, Any]) -> str:
    """SHA-256 of what went in, and the commit where it came from the hub; a row per file."""
    lines = ["| source | file | SHA-256 |", "|---|---|---|"]
    for name, entry in zip(source_names(receipt), receipt["sources"], strict=True):
        origin = f"{name} @ {entry['commit'][:12]}" if "commit" in entry else name
        lines += [f"| {origin} | {file} | `{digest}` |" for file, digest in entry["shards"].items()]
    return "\n".join(lines) if len(lines) > 2 else "The sources were in memory: there are no files to hash."


def training(folder: Path) -> dict[str, Any] | None:
    """What Trainer's state says; None if there is none."""
    state = read_json(folder / TRAINING)
    if state is None:
        return None
    log = state.get("log_history", [])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "steps": state["global_step"],
        "epochs": state.get("epoch"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_evaluation": min(evaluations) if evaluations else None,
        "last_evaluation": evaluations[-1] if evaluations else None,
        "batch": state.get("train_batch_size"),
    }


def results(folder: Path, dataset: str | None) -> list[EvalResult]:
    """The measured figures in the files that `Trainer.save_metrics` writes, for the card's model-index.

    Args:
        folder: of the model.
        dataset: what they were measured on; without a name the figures cannot be published as results.
    """
    if dataset is None:
        return []
    found: dict[str, Any] = {}
    for name in RESULTS:
        found |= read_json(folder / name) or {}
    rates = ("_runtime", "_per_second", "_samples", "_total_flos")
    figures = {
        name.removeprefix("eval_"): value
        for name, value in found.items()
        if name.startswith("eval_") and not name.endswith(rates) and isinstance(value, int | float)
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
        )
        for name, value in sorted(figures.items())
    ]
