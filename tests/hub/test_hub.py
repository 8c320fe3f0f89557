"""push_to_hub and from_pretrained over HTTP, from two processes, against a server that plays the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub
from hub_cases import logits, tiny_model
from safetensors.torch import load, save_file

SCRIPT = Path(__file__).with_name("run_hub.py")
LAYOUTS = ("", "-sharded", "-fused")
CASES = ("hf_moe_mixed", "bam", "rmoe", "mole")


@pytest.fixture(scope="module")
def pulled(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process finds after another has pushed every case in every layout. Neither prints the token."""
    folder, answers = tmp_path_factory.mktemp("cases"), {}
    for case in CASES:
        model = tiny_model(case)
        model.save_pretrained(folder / case)
        save_file({"logits": logits(model)}, folder / case / "logits.safetensors")
    for step in ("push", "pull"):
        environment = {**os.environ, **hub.environment(tmp_path_factory.mktemp("home"))}  # an empty cache
        command = [sys.executable, "-W", "ignore", str(SCRIPT), step, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_what_comes_back_is_what_was_pushed(case: str, layout: str, pulled: dict[str, Any]):
    assert pulled[case][layout] == {"difference": 0, "problems": []}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_arrives_bit_for_bit(case: str, hub: FakeHub, pulled: dict[str, Any]):
    sent = {}
    for path, content in hub.repos[f"me/{case}-fused"].items():
        sent.update(load(content) if path.endswith(".safetensors") else {})
    state = tiny_model(case).state_dict()
    assert sent.keys() <= state.keys()
    assert state.keys() - sent.keys() <= {"lm_head.weight"}  # tied
    assert all(tensor.equal(state[name]) and tensor.dtype == state[name].dtype for name, tensor in sent.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_safetensors_text_and_the_stub_are_published(layout: str, hub: FakeHub, pulled: dict[str, Any]):
    for case in CASES:
        suffixes = {Path(path).suffix for path in hub.repos[f"me/{case}{layout}"]}
        assert ".safetensors" in suffixes <= {".safetensors", ".json", ".md", ".gitattributes", ".py"}
        code = {path for path in hub.repos[f"me/{case}{layout}"] if path.endswith(".py")}
        assert code == {"modeling_hf_moe.py"}  # the stub
    shards = [path for path in hub.repos["me/bam-sharded"] if path.endswith(".safetensors")]
    assert len(shards) > 1 or layout != "-sharded"


def test_token_reaches_the_hub_and_stays_out_of_what_is_published(hub: FakeHub, pulled: dict[str, Any]):
    assert f"Bearer {TOKEN}" in hub.tokens
    assert not [path for files in hub.repos.values() for path, file in files.items() if TOKEN.encode() in file]
    assert not [path for _, path in hub.requests if TOKEN in path]


def test_an_unknown_repository_is_a_clear_error(pulled: dict[str, Any]):
    assert "me/nowhere is not a local folder and is not a valid model identifier" in pulled["error"]
