"""Read the value of a ``--set`` option: ``KEY=VALUE``, with the value in TOML, or text for a key that takes text."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .recipe import Recipe
from .schema import find_field, resolve_paths, takes_list, takes_text

MAX_NESTING = 20  # of tables and lists in a recipe


def parse_set(item: str) -> dict[str, Any]:
    """Return the table of a ``--set`` option: ``train.lr=1`` gives ``{"train": {"lr": 1}}``.

    A relative path is relative to the working directory.

    Raises:
        ConfigError: The option is not ``KEY=VALUE``, or its value is nested too deeply or is not UTF-8.
    """
    key, equals, text = item.partition("=")
    key, text = key.strip(), text.strip()
    shown = item if len(item) <= 200 else f"{item[:200]}…"
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {shown}: expected KEY=VALUE, such as --set train.lr=1e-3")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {shown}: not UTF-8; recipes are UTF-8 text") from None
    value = _parse_value(key, text)
    parts = key.split(".")
    if (problem := find_problem(value, len(parts))) is not None:
        raise ConfigError(f"--set {shown}: {problem}")
    for part in reversed(parts):
        value = {part: value}
    try:
        return resolve_paths(Recipe, value, Path.cwd())
    except ConfigError as error:
        raise ConfigError(f"--set {shown}: {error}") from None


def _parse_value(key: str, text: str) -> Any:
    """Return the value that a text in TOML means for a key.

    Text that is not TOML is a string. So is all text for a key that takes strings, such as ``01:00:00`` for
    ``slurm.time``, except text in quotes, which TOML unquotes, and lists for a key that also takes lists.
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # ValueError: also an integer of more than 4300 digits
        return text
    value = table["value"]
    field = find_field(Recipe, key)
    kept = str | list if field is not None and takes_list(field.annotation) else str
    literal = field is not None and takes_text(field.annotation) and not isinstance(value, kept)
    return text if literal or len(table) > 1 else value


def find_problem(value: Any, depth: int = 0) -> str | None:
    """Return why a recipe cannot have a value of TOML, at any level of its tables and lists, or None if it can.

    Without recursion, so that deep nesting is no recursion error.

    Args:
        value: A value.
        depth: Number of tables around it.
    """
    level = [value]
    while level:
        if any(isinstance(each, int) and not -(2**63) <= each < 2**63 for each in level):
            return "an integer has more than the 64 bits that TOML allows"
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
        if level and depth > MAX_NESTING:
            return f"tables or lists are nested more than {MAX_NESTING} levels deep"
    return None
