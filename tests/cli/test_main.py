"""The program as a user meets it: help with examples, one-line errors."""

import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from hf_moe.cli.main import app, main

COMMANDS = ["quickstart", "upcycle", "verify", "export", "inspect", "card", "push", "run", "show", "env"]


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_moe.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0 and f"hf-moe {command}" in result.output and "Examples" in result.output


def test_the_program_lists_its_commands():
    result = CliRunner().invoke(app, [])
    assert all(command in result.output for command in COMMANDS)


def test_a_user_error_is_one_line():
    result = run("show", "gpt5")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("Error: Unknown model type 'gpt5'; choose from ['PanguProMoE', 'bailing_moe', ")
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback():
    result = run("--debug", "show", "gpt5")
    assert result.returncode != 0 and "Traceback" in result.stderr


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # given back afterwards
    monkeypatch.setattr("hf_moe.cli.main.app", lambda: warnings.warn("the first one's values are kept", stacklevel=1))
    monkeypatch.delenv("HF_MOE_DEBUG", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "Warning: the first one's values are kept\n"
