"""Load repositories by their code files: `python run_code.py FOLDER [--without]`; prints one JSON object.

Nobody imports hf_moe here; `--without` makes that impossible. Every folder in FOLDER is loaded with
`trust_remote_code=True`, saved again as FOLDER-again, and that is loaded too.
"""

import json
import sys
from pathlib import Path
from typing import Any

if "--without" in sys.argv:
    sys.modules["hf_moe"] = None  # pyright: ignore[reportArgumentType] - makes every import of it fail

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.arange(3, 19).view(1, 16)


def use(folder: Path) -> dict[str, Any]:
    """What one repository says, before and after it was saved again."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    again = folder.with_name(f"{folder.name}-again")
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "classifier": type(classifier).__name__,
        "generated": model.generate(IDS, max_new_tokens=4, do_sample=False).tolist(),
        "again": reloaded.generate(IDS, max_new_tokens=4, do_sample=False).tolist(),
        "files": sorted(path.name for path in again.glob("*.py")),
        "auto_map": json.loads((again / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"],
    }


def main(folder: Path) -> None:
    """Use all repositories; one that cannot be used says why."""
    answers: dict[str, Any] = {}
    for repository in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            answers[repository.name] = use(repository)
        except ImportError as error:
            answers[repository.name] = str(error)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
