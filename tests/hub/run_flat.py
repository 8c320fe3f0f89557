"""Use flat files in a process that cannot import hf_moe: `python run_flat.py FOLDER`, one sub-folder for each case.

Reads `flat.py`, the checkpoint beside it, `state.safetensors` and `input.safetensors`; prints one JSON object.
"""

import importlib.abc
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class Blocker(importlib.abc.MetaPathFinder):
    """Makes hf_moe impossible to import, installed or not."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] == "hf_moe":
            raise ModuleNotFoundError(f"{fullname} is blocked", name=fullname)


sys.meta_path.insert(0, Blocker())

import torch
import transformers
from safetensors.torch import load_file


def load(path: Path) -> ModuleType:
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"flat_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(folder: Path) -> dict[str, Any]:
    """A config.json but for the name of the code file."""
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "auto_map"}


@torch.no_grad()
def use(folder: Path) -> dict[str, Any]:
    """Load one checkpoint in every way and compare with what hf_moe said."""
    flat, given = load(folder / "flat.py"), load_file(folder / "input.safetensors")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    built = type(model)(config).eval()
    built.load_state_dict(load_file(folder / "state.safetensors"), strict=False)
    again = folder / "again"
    model.save_pretrained(again)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    generated = model.generate(given["input_ids"], max_new_tokens=4, do_sample=False)
    return {
        "module": type(model).__module__ == flat.__name__ and type(config).__module__ == flat.__name__,
        "problems": [str(keys) for keys in info.values() if keys],
        "loaded": (model(given["input_ids"]).logits - given["logits"]).abs().max().item(),
        "built": (built(given["input_ids"]).logits - given["logits"]).abs().max().item(),
        "saved": without_code(again) == without_code(folder)
        and (again / "flat.py").read_text() == (folder / "flat.py").read_text()
        and load_file(again / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys(),
        "generated": generated.tolist(),
        "classifier": type(classifier).__name__,
    }


if __name__ == "__main__":
    answers = {folder.name: use(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    print(json.dumps(answers))
