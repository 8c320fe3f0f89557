"""`hf-moe inspect`: tables, one JSON object, one page; refusals in one line, before any weights are read."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_moe.analysis import expert_statistics, model_facts
from hf_moe.cli.inspect import inspect
from hf_moe.testing import tiny_config

app = typer.Typer()
app.command()(inspect)
WORDS = [f"w{number}" for number in range(60)]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, dtype="bfloat16"),
    "rmoe": tiny_config("rmoe", vocab_size=64),
    "llama": LlamaConfig(**SIZES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per model with a tokenizer, and texts."""
    root = tmp_path_factory.mktemp("inspect")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{w: n for n, w in enumerate(WORDS, 1)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(root / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(root / name)
    (root / "code.txt").write_text(" ".join(WORDS[:30]) + "\n\n" + " ".join(WORDS[:7]))
    lines = [json.dumps({"text": " ".join(WORDS[start : start + 20])}) for start in (20, 35)]
    (root / "law.jsonl").write_text("\n".join(lines))
    (root / "empty.txt").write_text(" \n\n ")
    return root


def run(*arguments: object) -> str:
    """What the command prints on stdout; its errors are raised."""
    return CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False).stdout


def data(folder: Path) -> list[object]:
    return ["--data", folder / "code.txt", "--data", f"court={folder / 'law.jsonl'}"]


def test_the_facts_need_no_weights(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "mixtral" / "config.json").read_text())
    printed = run(tmp_path)
    facts = model_facts(CONFIGS["mixtral"])
    assert f"{facts.parameters:,}" in printed and "4 MixtralExperts of width 16" in printed
    assert "not on this machine" in printed and "Routing" not in printed


@pytest.mark.parametrize("name", ["mixtral", "rmoe"])
def test_json_is_one_object_with_what_the_functions_return(name: str, folder: Path):
    found = json.loads(run(folder / name, *data(folder), "--json", "--device", "cpu"))
    assert found["disk_bytes"] == (folder / name / "model.safetensors").stat().st_size
    assert found["facts"]["dtype"] == ("bfloat16" if name == "mixtral" else "float32")
    assert found["routing"]["tokens"] == {"code": 37, "court": 40}
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    ids = {"code": [range(1, 31), range(1, 8)], "court": [range(21, 41), range(36, 56)]}
    expected = expert_statistics(model, {domain: [list(d) for d in given] for domain, given in ids.items()})
    for layer, other in zip(found["routing"]["layers"], expected.layers, strict=True):
        assert layer["name"] == other.name and layer["loads"] == pytest.approx(other.loads)
        assert layer["divergence"] == pytest.approx(other.divergence)
        assert layer["coactivation"] == [pytest.approx(row) for row in other.coactivation]
    assert found["facts"]["layers"][0]["num_experts"] == 4


def test_tables_and_page(folder: Path, tmp_path: Path):
    page = tmp_path / "new" / "report.html"
    printed = run(folder / "mixtral", *data(folder), "--report", page, "--max-tokens", 10)
    assert "code: 10 tokens, court: 10 tokens" in printed and "MaxVio" in printed and f"Wrote {page}" in printed
    assert page.read_text().startswith("<!DOCTYPE html>") and "Co-activation" in page.read_text()
    with pytest.raises(ValueError, match="exists already; add --overwrite"):
        run(folder / "mixtral", "--report", page)
    assert json.loads(run(folder / "mixtral", "--report", page, "--overwrite", "--json"))["routing"] is None
    assert "Co-activation" not in page.read_text()


def test_dtype_is_that_of_weights_and_cache(folder: Path):
    found = [json.loads(run(folder / "mixtral", "--json", "--dtype", dtype)) for dtype in ("float32", "float16")]
    assert [each["facts"]["dtype"] for each in found] == ["float32", "float16"]
    assert found[0]["facts"]["cache_bytes_per_token"] == 2 * found[1]["facts"]["cache_bytes_per_token"] > 0


def test_a_dense_model_has_facts_but_no_routing(folder: Path):
    assert "LlamaMLP" in run(folder / "llama")
    with pytest.raises(ValueError, match="llama has no layers with routed experts"):
        run(folder / "llama", *data(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "DIR/nothing.txt"], "there is no file .*nothing.txt"),
        (["--data", "DIR/empty.txt"], "empty.txt holds no text"),
        (["--data", "DIR/mixtral/config.json"], r"must be one of \['.txt', '.jsonl'\]"),
        (["--data", "=DIR/code.txt"], "must be FILE or NAME=FILE"),
        (["--data", "DIR/code.txt", "--data", "code=DIR/law.jsonl"], "two domains are called 'code'"),
        (["--data", "DIR/code.txt", "--device", "abacus"], "--device abacus: torch cannot use it here"),
        (["--data", "DIR/code.txt", "--device", "meta"], "--device meta holds no weights"),
        (["--device", "cpu"], "have no effect without --data"),
        (["--max-tokens", "5"], "have no effect without --data"),
        (["--dtype", "int3"], "dtype='int3' is unknown"),
        (["--report", "DIR/page.txt"], "must end in .html"),
        (["--overwrite"], "no effect without --report"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: list[str], message: str, folder: Path):
    with pytest.raises(ValueError, match=message) as error:
        run(folder / "mixtral", *[item.replace("DIR", str(folder)) for item in arguments])
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_read(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is not a model folder: it has no config"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is neither a local folder nor a model of the hub") as error:
        run(tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt9_moe"}))
    with pytest.raises(ValueError, match="cannot read its config") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text((folder / "mixtral" / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot load its tokenizer"):
        run(tmp_path, *data(folder))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((folder / "mixtral" / file).read_text())
    with pytest.raises(ValueError, match="cannot load its weights"):
        run(tmp_path, *data(folder))


@pytest.mark.allow_warnings("MISSING", "newly initialized")
def test_a_checkpoint_without_a_router_is_refused(folder: Path, tmp_path: Path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((folder / "mixtral" / file).read_text())
    tensors = load_file(folder / "mixtral" / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("gate.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 of its weights is missing, such as model"):
        run(tmp_path, *data(folder))
