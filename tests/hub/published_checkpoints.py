"""What every test of a published checkpoint does: write it at tiny size, load it, save it, compare."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401 - registers the types

sys.path.insert(0, str(Path(__file__).parents[1] / "published"))
from naive import silu

IDS = [5, 9, 3, 17, 40, 8]


def load(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> torch.nn.Module:
    """Write a checkpoint as published and load it as a user would; every key is used and none is missing."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def saves_back(model: torch.nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The same names and numbers in the files, the same values in the published fields."""
    model.save_pretrained(folder)
    saved = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    written = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype", "rope_theta")}
    assert {key: written.get(key) for key in known if known[key] is not None} == {
        key: value for key, value in known.items() if value is not None
    }
    assert written["rope_parameters"]["rope_theta"] == config.get("rope_theta", 10000.0)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Norms around 1, everything else around 0."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1 and "norm" in name
        else 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A gated feed-forward by the names of its three matrices."""
    gate, up = (w[f"{name}{half}_proj.weight"] @ x for half in ("gate", "up"))
    return w[f"{name}down_proj.weight"] @ (silu(gate) * up)
