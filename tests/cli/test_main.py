"""The program as a user meets it: help with examples, one-line errors."""

import sys
import warnings

import pytest
from typer.testing import CliRunner

from hf_moe.cli.main import app, main

COMMANDS = ["quickstart", "upcycle", "verify", "export", "inspect", "card", "push", "run", "show", "env"]


def run(monkeypatch, *args: str) -> int:
    """The exit code of the program, in this process."""
    monkeypatch.setattr(sys, "argv", ["hf-moe", *args])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # given back afterwards
    monkeypatch.setenv("HF_MOE_DEBUG", "")  # given back too: `--debug` sets it
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0 and f"hf-moe {command}" in result.output and "Examples" in result.output


def test_the_program_lists_its_commands():
    result = CliRunner().invoke(app, [])
    assert all(command in result.output for command in COMMANDS)


def test_a_user_error_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "show", "gpt5") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("Error: Unknown model type 'gpt5'; choose from ['PanguProMoE', 'bailing_moe', ")


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="Unknown model type 'gpt5'"):  # Python prints what nobody catches
        run(monkeypatch, "--debug", "show", "gpt5")


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # given back afterwards
    monkeypatch.setattr("hf_moe.cli.main.app", lambda: warnings.warn("the first one's values are kept", stacklevel=1))
    monkeypatch.delenv("HF_MOE_DEBUG", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "Warning: the first one's values are kept\n"
