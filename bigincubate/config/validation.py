"""Validate the tables of a recipe. An error names the key, what it expects, and the closest key for an unknown one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from datetime import date, time
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from ..errors import ConfigError
from .schema import find_field, inner_table, list_alternatives, takes_list, takes_text

MAX_PROBLEMS, MAX_GIVEN = 10, 200  # listed problems; characters of a refused value
TYPE_EXAMPLES: dict[Any, Any] = {bool: True, int: 1, float: 0.5}
Table = TypeVar("Table", bound=BaseModel)


def validate(table: type[Table], raw: Any, prefix: str, where: str) -> Table:
    """Return the validated table.

    Args:
        table: The schema.
        raw: The values.
        prefix: Dotted key of the table; empty for a whole recipe.
        where: Where the values come from, for the error message.

    Raises:
        ConfigError: A value is invalid. The message lists up to ten problems in one line.
    """
    try:
        return table.model_validate(raw)
    except ValidationError as error:
        problems = list(dict.fromkeys(_describe(table, prefix, each) for each in _first_branches(error.errors())))
        more = f"; and {len(problems) - MAX_PROBLEMS} more problems" if len(problems) > MAX_PROBLEMS else ""
        raise ConfigError(f"{where}: {'; '.join(problems[:MAX_PROBLEMS])}{more}") from None


def _first_branches(errors: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Yield the errors, for each union only those of the first type that it accepts."""
    branches: dict[tuple[Any, ...], Any] = {}
    for error in errors:
        place = error["loc"]
        at = next((n for n, part in enumerate(place) if not _is_key(part)), None)
        if at is None or branches.setdefault(place[:at], place[at]) == place[at]:
            yield error


def _is_key(part: int | str) -> bool:
    """Return whether a part of the path of an error is a key or an index, not the branch of a union."""
    return isinstance(part, int) or re.fullmatch(r"\w+", part) is not None


def _describe(table: type[BaseModel], prefix: str, error: ErrorDetails) -> str:
    names = [str(part) for part in error["loc"] if _is_key(part)]
    key = ".".join([prefix, *names] if prefix else names)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest_key(table, names, prefix)}"
    if error["type"] == "missing":
        field = find_field(table, ".".join(names))
        is_table = field is not None and inner_table(field) is not None
        return f"the table [{key}] is missing" if is_table else f"the key {key!r} is missing"
    text = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict | BaseModel) else f" (given: {_format_given(error['input'])})"
    example = _example(table, names, key, error["input"]) if error["type"].endswith("_type") else ""
    return f"{key}: {text}{given}{example}" if key else text


def _format_given(value: Any) -> str:
    """Return a refused value about as it is written in TOML, in one line of limited length."""
    if isinstance(value, bool):
        return json.dumps(value)
    text = value.isoformat() if isinstance(value, date | time) else repr(value)
    return text if len(text) <= MAX_GIVEN else text[:MAX_GIVEN] + "…"


def _example(table: type[BaseModel], names: list[str], key: str, given: Any) -> str:
    """Return how to write a value of the type that a key expects."""
    field = find_field(table, ".".join(names))
    if field is None or inner_table(field) is not None:
        return ""
    default = field.get_default(call_default_factory=True)
    if takes_text(field.annotation) and not isinstance(given, list | dict):
        return f"; write it in quotes: {key} = {json.dumps(_format_given(given))}"
    shown: Any = None
    if default not in (None, PydanticUndefined, {}, []):
        shown = default
    elif takes_list(field.annotation):
        shown = ["a", "b"] if str in get_args(field.annotation) else [1, 2]
    else:
        kinds = list_alternatives(field.annotation)
        shown = next((TYPE_EXAMPLES[kind] for kind in kinds if kind in TYPE_EXAMPLES), None)
    return "" if shown is None else f"; expected a value such as {key} = {json.dumps(shown)}"


def _suggest_key(table: type[BaseModel], names: list[str], prefix: str) -> str:
    """Return a hint with the closest known key of the same table, or else of another table."""
    inner: type[BaseModel] = table
    for part in names[:-1]:
        inner = inner_table(inner.model_fields[part]) or inner
    above = [prefix] if prefix else []
    if near := difflib.get_close_matches(names[-1], inner.model_fields, n=1, cutoff=0.5):
        return f"; did you mean {'.'.join([*above, *names[:-1], near[0]])!r}?"
    keys = {key.rpartition(".")[2]: key for key in reversed(list(_iterate_keys(table)))}
    if near := difflib.get_close_matches(names[-1], keys, n=1, cutoff=0.8):
        return f"; did you mean {'.'.join([*above, keys[near[0]]])!r}?"
    return f"; known keys: {', '.join(inner.model_fields)}"


def _iterate_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a table, except those that override others."""
    for name, field in table.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _iterate_keys(field.annotation, f"{prefix}{name}.")
