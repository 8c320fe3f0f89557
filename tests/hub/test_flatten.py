"""The flat file of every architecture works, and says the same, where hf_moe cannot be imported."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cases import CASES, logits, tiny, tiny_model, token_ids
from safetensors.torch import save_file
from transformers import LlamaConfig

from hf_moe.hub.flatten import flatten
from hf_moe.modeling.blocks import Block
from hf_moe.modeling.model import DecoderModel
from hf_moe.published import AMBIGUOUS, PUBLISHED

SCRIPT = Path(__file__).with_name("run_flat.py")


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of the flat file of each case."""
    return {case: flatten(tiny(case)) for case in CASES}


@pytest.fixture(scope="module")
def answers(flat: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `run_flat.py` found in one process without hf_moe, and what hf_moe itself generates."""
    folder = tmp_path_factory.mktemp("flat")
    ours = {}
    for case, text in flat.items():
        model = tiny_model(case)
        model.save_pretrained(folder / case)
        (folder / case / "flat.py").write_text(text)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, folder / case / "state.safetensors")
        save_file({"input_ids": token_ids(), "logits": logits(model)}, folder / case / "input.safetensors")
        ours[case] = model.generate(token_ids(), max_new_tokens=4, do_sample=False).tolist()
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    return {case: {**theirs[case], "ours": ours[case]} for case in CASES}


def test_same_model_without_the_package(answers: dict[str, dict]):
    """One test for all cases: their process without hf_moe starts once, on one worker."""
    for case, answer in answers.items():
        assert answer["module"] and not answer["problems"], case
        assert answer["loaded"] == 0 and answer["built"] == 0, case
        assert answer["saved"], case
        assert answer["generated"] == answer["ours"], case
        assert answer["classifier"].endswith("ForSequenceClassification"), case


@pytest.mark.parametrize("case", CASES)
def test_imports_nothing_of_ours_and_binds_each_name_once(case: str, flat: dict[str, str]):
    tree = ast.parse(flat[case])
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in modules if module.startswith("hf_moe")]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("case", "kept", "dropped"),
    [
        ("bam", ["SoftMixtureOfAttention", "TopK", "Swiglu"], ["Attention", "Recurrent", "Latent", "UngatedMlp"]),
        ("rmoe", ["Attention", "Recurrent", "Swiglu"], ["SoftMixtureOfAttention", "TopK", "Latent", "Parallel"]),
        ("mole", ["Attention", "TopK", "Latent"], ["SoftMixtureOfAttention", "Recurrent", "Swiglu", "Parallel"]),
        ("hf_moe_dense", ["Attention", "Mlp", "Parallel"], ["Moe", "TopK", "Swiglu", "Latent"]),
    ],
)
def test_holds_the_parts_in_use_and_no_others(case: str, kept: list[str], dropped: list[str], flat: dict[str, str]):
    defined = {node.name for node in ast.parse(flat[case]).body if isinstance(node, ast.ClassDef)}
    assert set(kept) <= defined
    assert not set(dropped) & defined


@pytest.mark.parametrize("case", CASES)
def test_keeps_comments_and_docstrings(case: str, flat: dict[str, str]):
    for source in (DecoderModel, type(tiny(case)), Block):
        assert inspect.getsource(source).strip() in flat[case]
    assert "Read this file first" in flat[case]  # from the docstring of a module
    assert flat[case].startswith('"""') and "Written by hf_moe" in flat[case]


def test_passes_the_linter_and_is_formatted(flat: dict[str, str], tmp_path: Path):
    for case, text in flat.items():
        (tmp_path / f"{case}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "E,F,I"], ["format", "--check"]):
        options = ["--isolated", "--no-cache", "--line-length", "119", str(tmp_path)]
        done = subprocess.run([*ruff, *command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("model_type", [*PUBLISHED, *AMBIGUOUS])
def test_public_checkpoints_have_a_flat_file_too(model_type: str):
    config = {**PUBLISHED, **AMBIGUOUS}[model_type][0]()
    defined = {node.name for node in ast.parse(flatten(config)).body if isinstance(node, ast.ClassDef)}
    assert {type(config).__name__, "DecoderModel"} <= defined


def test_is_the_same_every_time(flat: dict[str, str]):
    assert flatten(tiny("bam")) == flat["bam"]


def test_refuses_a_config_that_is_not_ours():
    with pytest.raises(ValueError, match=r"Unknown model type 'llama'; choose from \['PanguProMoE', 'bailing_moe', "):
        flatten(LlamaConfig())
