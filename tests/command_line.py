"""All commands of the command line with their parameters, read from the application itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from bigincubate.cli.app import app


@dataclass(frozen=True)
class Parameter:
    """An option or argument of a command.

    Attributes:
        name: Name of the parameter of the function.
        option: The option with its dashes; None for an argument.
        kind: Type of one value: str, int, float, bool or Path.
        info: The `typer.models.ParameterInfo` of the parameter.
        required: Whether it must be given.
        repeated: Whether it may be given several times.
    """

    name: str
    option: str | None
    kind: Any
    info: Any
    required: bool
    repeated: bool


def iterate_commands() -> Iterator[tuple[tuple[str, ...], list[Parameter]]]:
    """Yield the words of each command and its parameters."""
    yield from _walk(typer.main.get_command(app), ())


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Parameter]]]:
    if inner := getattr(command, "commands", None):
        for name, each in inner.items():
            yield from _walk(each, (*words, name))
        return
    hints = get_type_hints(command.callback, include_extras=True)
    yield words, [_parameter(each, hints[each.name]) for each in command.params if each.name in hints]


def _parameter(parameter: Any, hint: Any) -> Parameter:
    hint, repeated = _without(hint, type(None)), False
    kind, info = (hint.__origin__, hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, None)
    kind = _without(kind, type(None))
    if get_origin(kind) is list:
        kind, repeated = get_args(kind)[0], True
    option = next((name for name in parameter.opts if name.startswith("-")), None)
    return Parameter(parameter.name, option, kind, info, parameter.required, repeated)


def _without(hint: Any, kind: type) -> Any:
    """Return the other type of a union with ``kind``, or the hint if it is no such union."""
    args = get_args(hint)
    return next(each for each in args if each is not kind) if kind in args else hint


def is_path(parameter: Parameter) -> bool:
    """Return whether the value of a parameter is a path."""
    return isinstance(parameter.kind, type) and issubclass(parameter.kind, Path)
