"""A saved model carries the file by which `trust_remote_code=True` finds its classes, and goes on carrying it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cases import SHARED_EXPERT, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import hf_moe
from hf_moe.testing import tiny_config

SCRIPT = Path(__file__).with_name("run_code.py")
IDS = torch.arange(3, 19).view(1, 16)
STUB = ["config.json", "generation_config.json", "model.safetensors", "modeling_hf_moe.py"]


def test_a_stub_by_default_and_a_flat_file_on_request(tmp_path: Path):
    model = tiny_model("bam")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == STUB
    model.save_pretrained(tmp_path, self_contained=True)  # in the place of the stub
    assert [path.name for path in tmp_path.glob("*.py")] == ["modeling_standalone.py"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf_moe.BamForCausalLM  # the installed package is preferred, no code of the folder runs
    loaded.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_standalone.py"]
    loaded.save_pretrained(tmp_path / "again", self_contained=False)
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_hf_moe.py"]


def test_a_config_alone_carries_it_too(tmp_path: Path):
    tiny_config("rmoe").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "modeling_hf_moe.py"]
    assert AutoConfig.from_pretrained(tmp_path).auto_map["AutoConfig"] == "modeling_hf_moe.RMoeConfig"


def test_a_subclass_of_a_user_carries_nothing_of_ours(tmp_path: Path):
    class Own(hf_moe.BamConfig):
        model_type = "own_bam"

    config = Own(**{key: value for key, value in tiny_config("bam").to_dict().items() if key != "model_type"})
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="Own is not a class of hf_moe"):
        hf_moe.BamForCausalLM(config).save_pretrained(tmp_path, self_contained=True)


def answers(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *options]
    environment = {**os.environ, "HF_HOME": str(folder.with_name("home")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "missing"])
def test_loads_where_nobody_imported_the_package(installed: bool, tmp_path: Path):
    """Two compositions of one type, each with parts that the other lacks, in one process."""
    shared = tiny_config("hf_moe", blocks={"shared": SHARED_EXPERT}, sliding_window=8)
    models = {"bam": tiny_model("bam"), "plain": tiny_model("hf_moe"), "shared": hf_moe.HfMoeForCausalLM(shared)}
    expected = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "repos" / name, self_contained=True)
        expected[name] = model.eval().generate(IDS, max_new_tokens=4, do_sample=False).tolist()
    models["bam"].save_pretrained(tmp_path / "repos" / "stub", self_contained=False)
    found = answers(tmp_path / "repos", *([] if installed else ["--without"]))
    stub = found.pop("stub")
    for name, answer in found.items():
        assert answer["generated"] == answer["again"] == expected[name]
        assert answer["class"].startswith("transformers_modules.")
        assert answer["classifier"].endswith("ForSequenceClassification")
        assert answer["files"] == ["modeling_standalone.py"]
        assert answer["auto_map"].startswith("modeling_standalone.")
    if installed:
        assert stub["class"] == "hf_moe.architectures.bam.BamForCausalLM"
        assert stub["generated"] == stub["again"] == expected["bam"]
        assert (stub["files"], stub["auto_map"]) == (["modeling_hf_moe.py"], "modeling_hf_moe.BamForCausalLM")
    else:
        assert stub == "This model needs the package hf_moe: run `pip install hf_moe`."
