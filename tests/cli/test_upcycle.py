"""`hf-moe upcycle` from the user's chair: plan, result, advice, refusals before any work."""

import json
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralForCausalLM
from typer.testing import CliRunner

from hf_moe.cli.plans import describe_memory
from hf_moe.cli.upcycle import upcycle
from hf_moe.conversion import METHODS, TARGETS, Options, plan_upcycling
from hf_moe.conversion.engine import plan_files

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
    for text in ("3 sources -> mixtral", "btx", f"{total:,}", f"{active:,}", "3 per layer, 2 per token", "model-2"):
        assert text in result.output
    assert f"Saved MixtralForCausalLM (torch.bfloat16) to {tmp_path / 'out'}" in result.output
    assert "Fine-tune the mixture on mixed data before you use it" in result.output
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


def test_a_dry_run_tells_routers_data_files_and_memory(sources, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}')
    flags = ["--to", "mixtral", "--method", "virtual_group", "--granularity", 2, "--num-experts", 4, "--dry-run"]
    result = run(
        sources[0], *flags, "--max-shard-size", "20KB", "--router-std", "1e-3", "--set", "megatron_scaling=no"
    )
    assert result.exit_code == 0, result.output
    plan = plan_upcycling(sources[0], Options(target="mixtral", method="virtual_group", granularity=2, num_experts=4))
    files = plan_files(plan.shapes, "20KB")
    assert len(files) > 2 and f"{len(files)} of at most 20KB" in result.output
    assert f"about {plan.peak_memory / 1e9:.2f} GB" in result.output and "(megatron_scaling=false)" in result.output
    assert "random: fresh rows from N(0, 0.001); equal in sets of 2 experts" in result.output
    assert "not read" in result.output
    result = run(sources[0], "--to", "hf_moe", "--method", "attention", "--dry-run")
    assert "nothing random" in result.output and "none, feed-forwards stay dense" in result.output, result.output
    flags = ["--to", "qwen2_moe", "--num-experts", 4, "--dry-run"]
    assert "4 per layer, 2 per token, 1 shared" in run(sources[0], *flags).output
    flags = ["--to", "mixtral", "--router-init", "kmeans", "--data", tmp_path / "texts.jsonl", "--router-steps", 3]
    result = run(sources[0], *flags, "--dry-run")
    assert "kmeans: centroids of the hidden states that the router reads" in result.output, result.output
    assert "read to find the routers' rows (kmeans), read to train the routers for 3 steps" in result.output
    assert all(text in result.output for text in ("a whole source", "the whole result", "layers in float32"))
    assert "layers in float32" not in run(sources[0], *flags, "--no-verify", "--dry-run").output
    result = run(sources[0], "--to", "mixtral", "--router-steps", 3, "--dry-run")
    assert "router_steps=3 must not be negative, and needs data to train on" in str(result.exception)


def test_the_memory_of_a_layer_in_float32(sources):
    plan = plan_upcycling(sources[0], Options(target="mixtral", num_experts=4, dtype="bfloat16"))
    model = MixtralForCausalLM(plan.config)
    largest = max(sum(each.numel() for each in layer.parameters()) for layer in model.model.layers)
    plan = SimpleNamespace(
        **{name: getattr(plan, name) for name in ("peak_memory", "method", "options")},
        shapes={name: ((*shape[:-1], shape[-1] * 100_000), dtype) for name, (shape, dtype) in plan.shapes.items()},
    )
    assert describe_memory(plan, {})[-1].startswith(f"about {0.45 + 2 * largest * 4e5 / 1e9:.2f} GB to compare")


def test_the_table_of_methods_is_complete():
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--list-methods"])
    assert result.exit_code == 0, result.output
    for method in METHODS.values():
        assert method.name in result.output and method.paper in result.output
        assert all(f"{option}" in result.output for option in method.options())
    for text in ("drop_ratio=0.5", "common_neurons=true", "split_by=random", "output_scale=null", "2 or more sources"):
        assert text in result.output


@pytest.fixture
def recipe(sources, tmp_path):
    """A recipe that makes three copies of one source."""
    lines = [f"sources: {sources[0]}", "target: mixtral", "method: drop", "drop_ratio: 0.25", "num_experts: 3"]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([*lines, "seed: 5", "router_std: 0.5", "verify: false", f"output: {tmp_path / 'made'}"]))
    return path


def test_a_recipe_says_everything(sources, recipe, tmp_path):
    result = run("--config", recipe)
    assert (
        result.exit_code == 0 and f"Saved MixtralForCausalLM (torch.float32) to {tmp_path / 'made'}" in result.output
    )
    flags = ["--to", "mixtral", "--method", "drop", "--set", "drop_ratio=0.25", "--num-experts", 3, "--seed", 5]
    assert run(sources[0], *flags, "--router-std", 0.5, "--no-verify", "-o", tmp_path / "same").exit_code == 0
    made, same = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "same"))
    assert made.keys() == same.keys() and all(torch.equal(made[name], same[name]) for name in made)


def test_flags_override_a_recipe_even_with_their_defaults(sources, recipe, tmp_path):
    flags = ["--seed", 0, "--router-std", 0.02, "--verify", "--method", "noise", "--set", "noise_std=1e-3"]
    recipe.write_text(recipe.read_text().replace("drop_ratio: 0.25\n", "noise_std: 0.5\nnoise_fraction: 0.25\n"))
    result = run(sources[2], "--config", recipe, *flags, "-o", tmp_path / "other")
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "other" / "conversion.json").read_text())
    told = {name: receipt["recipe"][name] for name in ("method", "num_experts", "seed", "router_std")}
    assert told == {"method": "noise", "num_experts": 3, "seed": 0, "router_std": 0.02}
    assert receipt["recipe"]["method_options"] == {"noise_std": 0.001, "noise_fraction": 0.25}
    assert receipt["sources"][0]["folder"] == "model-2" and len(receipt["exactness"]["measured"]) == 1
    assert not (tmp_path / "made").exists()


def test_what_is_missing_is_said_at_once(sources, recipe, tmp_path):
    recipe.write_text("target: mixtral")
    for arguments, message in [
        ([], "missing: SOURCE and --to TYPE and --output DIR; add what is missing, or name a recipe that says it"),
        ([sources[0], "-o", tmp_path / "x"], "missing: --to TYPE; add"),
        ([sources[0], "--to", "mixtral"], "missing: --output DIR; add"),
        (["--config", recipe, "-o", tmp_path / "x"], "recipe.yaml: says no sources; add it there, or pass SOURCE"),
        (["--config", recipe, sources[0]], "missing: --output DIR; add what is missing"),
        (["--config", tmp_path / "none.yaml"], "none.yaml: cannot read the recipe"),
        ([sources[0], "--to", "mixtral", "-o", tmp_path / "x", "--report", tmp_path / "no" / "x"], "must name a file"),
    ]:
        result = run(*arguments)
        assert isinstance(result.exception, ValueError) and message in str(result.exception), result.output
    assert run("--config", recipe, sources[0], "--dry-run").exit_code == 0


def test_options_of_a_method_and_fields_of_the_config(sources, tmp_path):
    flags = ["--to", "mixtral", "--method", "drop", "--set", "drop_ratio=0.25", "--set", "router_aux_loss_coef=0.5"]
    result = run(sources[0], *flags, "-o", tmp_path / "out")
    assert result.exit_code == 0 and "every expert has lost 25% of its neurons" in result.output, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_aux_loss_coef"] == 0.5
    for wrong, message in (
        ("drop_ratio", "must be NAME=VALUE"),
        ("nothing=1", "--set nothing is unknown; choose from"),
        ("drop_ratoi=1", "--set drop_ratoi is unknown; did you mean drop_ratio (an option of method='drop')?"),
        ("drop_ratio=half", "--set drop_ratio='half' must be a number"),
        ("drop_ratio=[1", "the value cannot be read: line 1, column 3: no YAML"),
        ("top_k=3", "--set top_k: it is for a method's own options; top_k has its own flag"),
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
    assert json.loads((tmp_path / "quick" / "conversion.json").read_text())["exactness"]["measured"] == []


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
