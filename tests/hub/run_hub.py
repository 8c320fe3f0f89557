"""Talk to a hub in a process of its own: `python run_hub.py push|pull FOLDER`; the environment says which hub.

`push` publishes the checkpoint in FOLDER/CASE as me/CASE, whole, in shards and with fused experts. `pull` loads all of
them and prints, as one JSON object, how far their logits are from FOLDER/CASE/logits.safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hub_cases import logits
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LAYOUTS = ("", "-sharded", "-fused")


def push(folder: Path) -> None:
    """Publish one case in every layout."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    repo = f"me/{folder.name}"
    model.push_to_hub(repo)
    model.push_to_hub(f"{repo}-sharded", max_shard_size="50KB")
    model.save_pretrained(folder / "fused", save_original_format=False)
    api = HfApi()
    api.create_repo(f"{repo}-fused", exist_ok=True)
    api.upload_folder(repo_id=f"{repo}-fused", folder_path=folder / "fused")


def pull(folder: Path) -> dict[str, Any]:
    """Load one case from every layout."""
    expected, answers = load_file(folder / "logits.safetensors")["logits"], {}
    for layout in LAYOUTS:
        repo = f"me/{folder.name}{layout}"
        model, info = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True)
        problems = [str(keys) for keys in info.values() if keys]
        answers[layout] = {"difference": (logits(model) - expected).abs().max().item(), "problems": problems}
    return answers


def error() -> str:
    """What a user reads who asks for a repository that is not there."""
    try:
        AutoModelForCausalLM.from_pretrained("me/nowhere")
    except OSError as problem:
        return str(problem)
    return ""


if __name__ == "__main__":
    cases = sorted(Path(sys.argv[2]).iterdir())
    answers: dict[str, Any] = {folder.name: {"push": push, "pull": pull}[sys.argv[1]](folder) for folder in cases}
    print(json.dumps({**answers, "error": error()}))
