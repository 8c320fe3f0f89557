"""`hf-moe env`: says what is installed, and nothing personal."""

import getpass
import json
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import hf_moe
from hf_moe.cli.env import env

env_module = import_module("hf_moe.cli.env")
app = typer.Typer()
app.command()(env)


def run(*arguments: str) -> str:
    """What the command prints."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""

    def found(package: str) -> str:
        if package in packages:
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(env_module, "version", found)


def test_versions_and_architectures_are_those_in_use():
    facts = json.loads(run("--json"))
    assert facts["versions"]["hf_moe"] == hf_moe.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"].startswith(platform.python_version())
    assert facts["architectures"] == sorted(hf_moe.ARCHITECTURES)
    assert f"{len(hf_moe.ARCHITECTURES)}: " in run()


def test_missing_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "matplotlib")
    (line,) = [line for line in run().splitlines() if line.startswith("extra plot ")]
    assert line.split(maxsplit=2)[2] == "missing matplotlib>=3.9; pip install 'hf_moe[plot]'"
    assert json.loads(run("--json"))["extras"]["plot"] == ["matplotlib>=3.9"]


def test_too_old_counts_as_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(env_module, "version", lambda package: "0.0.1")
    assert json.loads(run("--json"))["extras"]["plot"] == ["matplotlib>=3.9"]


def test_absent_package_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "trl")
    assert json.loads(run("--json"))["versions"]["trl"] is None
    assert "trl " in run() and "not installed" in run()


def test_nothing_personal(monkeypatch: pytest.MonkeyPatch):
    secret = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    for text in (run(), run("--json")):
        assert secret not in text and platform.node() not in text
        assert str(Path.home()) not in text and str(Path.cwd()) not in text
        assert f"/{getpass.getuser()}" not in text


def test_accelerators_are_named(monkeypatch: pytest.MonkeyPatch):
    assert ("none, torch runs on the CPU" in run()) == (not torch.accelerator.is_available())
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert json.loads(run("--json"))["accelerators"] == ["mps"]


def test_help_shows_examples():
    assert "hf-moe env --json" in run("--help")
