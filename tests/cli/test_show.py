"""`hf-moe show`: prints or writes the flat file, and refuses what it cannot do in one line."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import hf_moe
from hf_moe.cli.show import show
from hf_moe.hub.flatten import flatten
from hf_moe.testing import tiny_config

app = typer.Typer()
app.command()(show)


def run(*arguments: object) -> str:
    """What the command prints; its errors are raised."""
    return CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False).output


@pytest.mark.parametrize("model_type", hf_moe.ARCHITECTURES)
def test_prints_the_flat_file_of_the_default_config(model_type: str):
    assert run(model_type) == flatten(hf_moe.ARCHITECTURES[model_type][0]())


@pytest.mark.parametrize("name", ["", "config.json"])
def test_config_is_a_file_or_a_folder(name: str, tmp_path: Path):
    config = tiny_config("hf_moe")
    config.save_pretrained(tmp_path)
    printed = run("hf_moe", "--config", tmp_path / name)
    assert printed == flatten(config)
    assert "class Moe(" in printed and "class Moe(" not in run("hf_moe")


def test_writes_the_same_to_a_file(tmp_path: Path):
    file = tmp_path / "new" / "modeling_bam.py"
    assert run("bam", "--output", file) == f"Wrote {file} ({len(file.read_text().splitlines())} lines).\n"
    assert file.read_text() == run("bam")
    assert [path.name for path in file.parent.iterdir()] == ["modeling_bam.py"]


def test_keeps_an_existing_file_unless_told(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("mine")
    with pytest.raises(ValueError, match="exists already; add --overwrite"):
        run("bam", "--output", file)
    assert file.read_text() == "mine"
    run("bam", "--output", file, "--overwrite")
    assert file.read_text() == run("bam")


def test_options_that_cannot_be_meant(tmp_path: Path):
    with pytest.raises(ValueError, match="is a folder; --output needs the name of a file"):
        run("bam", "--output", tmp_path, "--overwrite")
    with pytest.raises(ValueError, match="--overwrite has no effect without --output"):
        run("bam", "--overwrite")


def test_leaves_nothing_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        run("bam", "--output", tmp_path / "bam.py")
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_names_the_choices():
    with pytest.raises(
        ValueError, match=r"Unknown model type 'llama'; choose from \['PanguProMoE', .*'bam', .*'rmoe'"
    ):
        run("llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; --config needs a config.json"),
        ("{", "is not a JSON file"),
        ("[]", "holds no JSON object"),
        (json.dumps({"model_type": "bam"}), "is the config of a 'bam' model, not of 'hf_moe'"),
        (json.dumps({"blocks": {"a": {"mixer": {"type": "magic"}, "feed_forward": {}}}}), "Unknown type 'magic'"),
    ],
)
def test_bad_config_is_one_clear_error(content: str | None, message: str, tmp_path: Path):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        run("hf_moe", "--config", file)


def test_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch):
    assert "\x1b[" not in run("bam")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run("bam")


def test_help_shows_examples():
    assert "hf-moe show rmoe --output" in run("--help")
