"""`hf-moe upcycle` from the user's chair: plan, result, advice, refusals before any work."""

import json

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from hf_moe.cli.upcycle import upcycle
from hf_moe.conversion import METHODS, TARGETS

app = typer.Typer()
app.command()(upcycle)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three folders with different models of one shape."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        folders.append(tmp_path_factory.mktemp("sources") / f"model-{seed}")
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1])
    return folders


def test_help_has_examples_and_all_choices():
    text = run("--help").output
    assert "hf-moe upcycle base code math law --to bam" in text
    assert all(name in text for name in [*TARGETS, *METHODS])
    options = "--to --output --method --num-experts --top-k --router-init --router-std --share-key-value --block-type"
    assert all(
        flag in text for flag in (*options.split(), "--dtype", "--seed", "--overwrite", "--resume", "--dry-run")
    )


def test_btx(sources, tmp_path):
    result = run(*sources, "--to", "mixtral", "--output", tmp_path / "out", "--top-k", 2, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    total = sum(p.numel() for p in mixture.parameters())
    active = total - 2 * 1 * 3 * 32 * 40  # two layers, one expert that a token does not visit
    for text in ("3 dense -> mixtral", "btx", f"{total:,}", f"{active:,}", "3 per layer, 2 per token", "model-2"):
        assert text in result.output
    assert f"Saved MixtralForCausalLM (torch.bfloat16) to {tmp_path / 'out'}" in result.output
    assert "fine-tune the mixture on mixed data before you use it" in result.output
    assert mixture.config.num_local_experts == 3 and mixture.dtype == torch.bfloat16


def test_copy_says_that_it_is_exact(sources, tmp_path):
    result = run(sources[0], "--to", "hf_moe", "--num-experts", 4, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "It computes what its source computes" in result.output, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "hf_moe"


def test_bam_with_every_flag(sources, tmp_path):
    flags = ["--method", "bam", "--num-experts", 3, "--top-k", 2, "--router-init", "random", "--router-std", 0.1]
    flags += ["--share-key-value", "--block-type", "pre_norm", "--seed", 3, "--dtype", "float32", "--overwrite"]
    result = run(*sources, "--to", "bam", "--output", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.block_type, config.share_key_value, config.num_experts_per_tok) == ("pre_norm", True, 2)


def test_a_dry_run_prints_the_plan_and_writes_nothing(sources, tmp_path, monkeypatch):
    from hf_moe.conversion.checkpoints import Checkpoint

    monkeypatch.setattr(Checkpoint, "read", None)
    flags = ["--to", "hf_moe", "--layers", "every-2", "--num-experts", 4, "--dry-run", "--output", tmp_path / "out"]
    result = run(sources[0], *flags)
    assert result.exit_code == 0, result.output
    for text in ("1 of 2", "4 per layer, 2 per token", "before training", "exact", '"block_pattern"', "parameters"):
        assert text in result.output, text
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_method_and_fields_of_the_config(sources, tmp_path):
    flags = ["--to", "mixtral", "--method", "drop", "--set", "drop_ratio=0.25", "--set", "router_aux_loss_coef=0.5"]
    result = run(sources[0], *flags, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "every expert has lost 25% of its neurons" in result.output, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_aux_loss_coef"] == 0.5
    for wrong, message in (
        ("drop_ratio", "must be NAME=VALUE"),
        ("nothing=1", "config overrides ['nothing'] are unknown"),
    ):
        result = run(sources[0], "--to", "mixtral", "--set", wrong, "-o", tmp_path / "again")
        assert message in str(result.exception)


def test_the_receipt_and_a_warm_up_of_the_routers(sources, tmp_path):
    flags = ["--to", "mixtral", "--num-experts", 4, "--report", tmp_path / "report.json", "-o", tmp_path / "out"]
    result = run(sources[0], *flags)
    assert result.exit_code == 0 and "Against" in result.output and "largest difference of logits" in result.output
    receipt = json.loads((tmp_path / "report.json").read_text())
    assert receipt == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (
        receipt["exactness"]["level"] == "exact" and receipt["exactness"]["measured"][0]["max_logit_difference"] < 1e-5
    )
    result = run(sources[0], "--to", "mixtral", "--router-steps", 2, "-o", tmp_path / "warm")
    assert "router_steps=2 must not be negative, and needs data to train on" in str(result.exception)
    result = run(sources[0], "--to", "mixtral", "--no-verify", "-o", tmp_path / "quick")
    assert "Against" not in result.output
    assert json.loads((tmp_path / "quick" / "conversion.json").read_text())["exactness"]["measured"] == [None]


def test_layers_that_stay_dense(sources, tmp_path):
    assert run(sources[0], "--to", "hf_moe", "--layers", "last-half", "-o", tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["block_pattern"] == ["dense", "moe"]
    result = run(sources[0], "--to", "mixtral", "--layers", "1", "-o", tmp_path / "again")
    assert "layers [0] would stay dense, and all its layers are sparse" in str(result.exception)


def test_refusals_come_before_any_work(sources, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text('{"model_type": "llama"}')
    for arguments, message in [
        ([*sources, "--to", "bamm", "--output", tmp_path / "out"], "target='bamm' is unknown; choose from"),
        ([sources[0], "--to", "bam", "--output", tmp_path / "out"], "needs at least 2 sources"),
        ([*sources, "--to", "bam", "--output", tmp_path / "taken"], "pass --overwrite"),
        ([*sources, "--to", "bam", "--output", sources[1], "--overwrite"], "cannot be replaced"),
        ([*sources, "--to", "bam", "--output", sources[1].parent], "holds no model: nothing there is touched"),
        (
            [tmp_path / "nowhere", "--to", "mixtral", "--output", tmp_path / "out"],
            "neither a local folder nor",
        ),
    ]:
        result = run(*arguments)
        assert isinstance(result.exception, ValueError) and message in str(result.exception), result.output
        assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_overwrite_replaces_a_model(sources, tmp_path):
    out = tmp_path / "out"
    for target in ("mixtral", "hf_moe"):
        assert run(*sources, "--to", target, "--output", out, "--overwrite").exit_code == 0
        assert json.loads((out / "config.json").read_text())["model_type"] == target
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
