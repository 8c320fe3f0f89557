"""Native targets, as somebody without this package sees them: the names in their files, and what they compute."""

import os
import subprocess
import sys

import pytest
import torch
from dense_models import dense_model, logits, token_ids
from exact_methods import EXACT_METHODS, exact_cases
from safetensors import safe_open
from safetensors.torch import save_file
from test_exactness import EXPRESSIBLE, NATIVE, PHI_WARNS, SOURCES

from hf_moe.conversion import TARGETS, Options, plan_upcycling, save_upcycled, upcycle

PAIRS = [(source, target) for target in NATIVE for source in EXPRESSIBLE[target]]
CASES = exact_cases(PAIRS)
WITHOUT_HF_MOE = """
import sys
from pathlib import Path

class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nobody())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
expected = load_file(folder / "logits.safetensors")
for number in range(len(expected) - 1):
    model = AutoModelForCausalLM.from_pretrained(folder / str(number)).eval()
    with torch.no_grad():
        found = model(expected["token_ids"], use_cache=False).logits
    print(number, model.config.model_type, (found - expected[str(number)]).abs().max().item())
assert "hf_moe" not in sys.modules
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(model type, largest difference of a logit) of every case, measured where hf_moe cannot be imported."""
    folder = tmp_path_factory.mktemp("native")
    expected = {"token_ids": token_ids()}
    for number, (source, target, method) in enumerate(CASES):
        family, overrides = SOURCES[source]
        model = dense_model(family, **overrides)
        expected[str(number)] = logits(model)
        save_upcycled(upcycle(model, target, router_std=0.5, **EXACT_METHODS[method].options), folder / str(number))
    save_file(expected, folder / "logits.safetensors")
    command = [sys.executable, "-c", WITHOUT_HF_MOE, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0 and "scaling factor" not in done.stderr, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {int(number): (model_type, float(difference)) for number, model_type, difference in lines}


@pytest.mark.allow_warnings(PHI_WARNS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[" -> ".join(case) for case in CASES])
def test_stock_transformers_computes_what_the_source_computes(number, measured):
    model_type, difference = measured[number]
    assert model_type == CASES[number][1]
    assert difference <= 1e-5


@pytest.mark.parametrize("target", NATIVE)
def test_files_have_the_names_that_the_stock_class_writes(target, tmp_path):
    family, overrides = SOURCES[EXPRESSIBLE[target][0]]
    model, options = dense_model(family, **overrides), {"num_experts": 2, "dtype": "bfloat16"}
    mixture = upcycle(model, target, **options)
    stock = TARGETS[target].model_class(mixture.config).to(torch.bfloat16)
    for module in stock.modules():
        if hasattr(module, "e_score_correction_bias"):  # which from_pretrained would keep in float32
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    stock.save_pretrained(tmp_path / "stock")
    save_upcycled(mixture, tmp_path / "ours")
    found = []
    for folder in ("stock", "ours"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found.append({name: (tuple(part.get_shape()), part.get_dtype()) for name, part in tensors.items()})
    assert found[0] == found[1]
    planned = plan_upcycling(model, Options(target=target, **options)).shapes  # what is streamed to disk
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32"}
    assert {name: (shape, kinds[dtype]) for name, (shape, dtype) in planned.items()} == found[0]
