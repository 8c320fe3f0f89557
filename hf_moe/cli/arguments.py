"""The arguments of `hf-moe upcycle`: what was typed, and what a recipe says beside it."""

from typing import Any

import typer

NOT_ARGUMENTS = ("config", "dry_run", "list_them", "push_to_hub", "private")  # flags that a recipe cannot hold
NOT_OUR_NAMES = {"to": "target"}  # flags with another name than the argument of `upcycle`


def given(context: typer.Context) -> dict[str, Any]:
    """The flags that were really typed, under the names of `upcycle`'s arguments; a recipe decides the others."""
    typed = {
        NOT_OUR_NAMES.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in context.params.items()
        if name not in NOT_ARGUMENTS and is_typed(context, name)
    }
    if len(typed.get("data", ())) == 1:
        typed["data"] = typed["data"][0]
    return typed


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line, even if with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def settle(typed: dict[str, Any], config: str | None, dry_run: bool) -> dict[str, Any]:
    """The arguments of `upcycle`: the recipe's, then what was typed.

    Raises:
        ValueError: sources, target or output are missing, or --set says something that nobody knows.
    """
    from ..conversion.recipe_files import ARGUMENTS, check_entry, known_names, read_recipe

    own = read_assignments(typed.pop("assignments", []))
    arguments = {**own, **typed}
    if config is not None:
        arguments = read_recipe(config, **arguments)
    needed = {"sources": "SOURCE", "target": "--to TYPE", "output": "--output DIR"}
    if dry_run:
        del needed["output"]
    if missing := [flag for name, flag in needed.items() if arguments.get(name) is None]:
        instead = "" if config is not None else ", or name a recipe that says it with --config FILE"
        raise ValueError(f"missing: {' and '.join(missing)}; add what is missing{instead}")
    known = {name: entry for name, entry in known_names(arguments["target"]).items() if name not in ARGUMENTS}
    for name, value in own.items():
        if name in ARGUMENTS:
            raise ValueError(f"--set {name}: it is for a method's own options; {name} has its own flag")
        check_entry("--set ", name, value, known)
    return arguments


def read_assignments(assignments: list[str]) -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, so 0.5, true and [1, 2] mean what they look like."""
    from ..conversion.strict_yaml import read_yaml

    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {assignment!r} must be NAME=VALUE")
        try:
            found[name], _ = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"--set {assignment!r}: the value cannot be read: {error}") from error
    return found


def as_list(sources: Any) -> list[Any]:
    """One source, or several."""
    return list(sources) if isinstance(sources, list | tuple) else [sources]
