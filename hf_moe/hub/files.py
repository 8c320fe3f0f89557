"""Which files of a model folder may be published: safetensors and text, never a pickle, never an access token."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")
# What Trainer leaves beside a model. It is needed to go on training here, and is pickled.
STATES = r"(optimizer|scheduler|scaler|random_states.*|rng_state.*)\.(pt|pth|bin|pkl)"
OF_TRAINING = re.compile(rf"training_args\.bin|{STATES}")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
LONGEST_TEXT = 2**24  # bytes; what is longer is no text that somebody wrote


@dataclass
class ModelFiles:
    """The files of a folder.

    Args:
        publish: paths inside the folder.
        left_out: path -> why it stays here.
    """

    publish: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def model_files(folder: Path) -> ModelFiles:
    """Sort the files of a folder, and check that its weights are complete.

    Raises:
        ValueError: no model, pickled weights, missing or truncated weights, or a file with an access token in it.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no model: there is no config.json (or adapter_config.json).")
    files = ModelFiles()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if reason := reason_to_leave_out(name):
            files.left_out[name] = reason
        else:
            check_kind(path)
            files.publish.append(name)
    check_weights(folder, files.publish)
    for name in files.publish:
        check_secrets(folder / name)
    return files


def reason_to_leave_out(name: str) -> str | None:
    """Why a file is no part of the model, or None."""
    parts = name.split("/")
    if any(part.startswith(".") and part != ".gitattributes" for part in parts):
        return "hidden"
    if "__pycache__" in parts:
        return "Python's cache"
    if any(re.fullmatch(r"checkpoint-\d+|global_step\d+|pytorch_model_fsdp_\d+", part) for part in parts[:-1]):
        return "a checkpoint of the training"
    return "pickled state of the training" if OF_TRAINING.fullmatch(parts[-1]) else None


def check_kind(path: Path) -> None:
    """Refuse formats that run code when they are loaded."""
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path.name} is not safetensors: loading such a file can run any code, so it is not published. Save the "
            "model with save_pretrained of Transformers 5, which writes safetensors, and delete this file."
        )


def check_weights(folder: Path, names: list[str]) -> None:
    """Every shard that an index names is there, and every safetensors file is whole."""
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors: there are no weights to publish.")
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        named = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        if missing := sorted(set(named) - {Path(name).name for name in weights}):
            raise ValueError(f"{folder}: {index} names {missing}, which are not there; save the model again.")
    for name in weights:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}); save the model again.") from error


def check_secrets(path: Path) -> None:
    """Refuse a text with something in it that looks like an access token of the hub; the token is not shown."""
    if path.suffix == ".safetensors" or path.stat().st_size > LONGEST_TEXT:
        return
    if found := TOKEN.search(path.read_bytes()):
        line = path.read_bytes()[: found.start()].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}, holds what looks like an access token: remove and revoke it.")
