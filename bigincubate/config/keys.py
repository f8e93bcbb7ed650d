"""List every recipe key with its type, default, unit and meaning, read from the schema."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..errors import ConfigError
from .recipe import Recipe, is_execution
from .schema import PathMark
from .sections import PhaseConfig, Settings

PAGE_COMMAND = "bigincubate recipes --keys --markdown > docs/recipe_keys.md"
UNIT = re.compile(r" ?Unit: ([^.]+)\.$")
TYPES = {str: "string", int: "integer", float: "number", bool: "true or false", dict: "table"}
TABLE_HEAD = ("| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |")
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class RecipeKey:
    """One key of a recipe.

    Attributes:
        key: Dotted key, such as ``train.lr``.
        type: Accepted values, in words.
        default: Default value as in TOML; ``"none"`` if the key is left out, ``"required"`` if it has no default.
        unit: Unit of the value; empty if it has none.
        meaning: One or two sentences.
        execution: Whether this is an execution key: it determines where or how to compute, not what.
    """

    key: str
    type: str
    default: str
    unit: str
    meaning: str
    execution: bool

    def __str__(self) -> str:
        """Return a description of the key in two lines."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.key}: {self.type}{unit}, default {self.default}\n    {self.meaning}"


def list_recipe_keys(pattern: str | None = None) -> list[RecipeKey]:
    """Return the keys of a recipe in the order of the schema.

    The tables that a phase may override are not repeated under each phase.

    Args:
        pattern: Part of a key, or a shell pattern such as ``train.*`` for a whole key; None: all keys.

    Raises:
        ConfigError: No key matches.
    """
    keys = list(_iterate_keys(Recipe, ""))
    if pattern is None:
        return keys
    found = [entry for entry in keys if pattern in entry.key or fnmatchcase(entry.key, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, [entry.key for entry in keys], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave out the pattern to list all keys"
        raise ConfigError(f"no recipe key matches {pattern!r}; {hint}")
    return found


def format_recipe_keys(keys: Sequence[RecipeKey]) -> str:
    """Return keys as a Markdown page, with one table for each table of the recipe: ``docs/recipe_keys.md``."""
    tables = ", ".join(f"`[{name}]`" for name in Settings.model_fields)
    lines = [
        "# Recipe keys",
        "",
        f"Every key of a recipe. This page is generated from the schema by `{PAGE_COMMAND}`.",
        "",
        f"A phase may override any key of the tables {tables}: `finetune.train.lr` is `train.lr` of fine-tuning.",
        "Every key with a default may be left out; the default `none` means that the key is not set.",
        "In keys of type `path`, `~` and environment variables are expanded. A relative path is relative to the folder",
        "of the recipe file, or in `--set` to the working directory. The run directory stores the absolute path.",
        "Keys marked * determine only where or how to compute, and may",
        "change when a run is resumed; all others determine what is computed",
        "([architecture](architecture.md#what-a-recipe-key-means)).",
    ]
    for table, entries in groupby(keys, key=lambda entry: entry.key.rpartition(".")[0]):
        lines += ["", f"## `[{table}]`" if table else "## Top level", "", *TABLE_HEAD]
        for entry in entries:
            mark = "\\*" if entry.execution else ""
            cells = f"`{entry.key}`{mark}", entry.type, f"`{entry.default}`", entry.unit, entry.meaning
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _iterate_keys(table: type[BaseModel], prefix: str) -> Iterator[RecipeKey]:
    """Yield the keys of a table, then those of its subtables."""
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner.append((name, field.annotation))
        elif not (issubclass(table, PhaseConfig) and name in Settings.model_fields):
            yield _make_recipe_key(f"{prefix}{name}", field)
    for name, own in inner:
        yield from _iterate_keys(own, f"{prefix}{name}.")


def _make_recipe_key(key: str, field: FieldInfo) -> RecipeKey:
    meaning = " ".join((field.description or "").split())
    unit = UNIT.search(meaning)
    default = field.get_default(call_default_factory=True)
    return RecipeKey(
        key=key,
        type=_name_type(field.annotation, field.metadata),
        default="required" if default is PydanticUndefined else "none" if default is None else json.dumps(default),
        unit=unit[1] if unit else "",
        meaning=UNIT.sub("", meaning),
        execution=is_execution(key),
    )


def _name_type(annotation: Any, constraints: list[Any], plural: str = "") -> str:
    """Return a description of the values other than None that an annotation accepts.

    Args:
        annotation: The type.
        constraints: Constraints of the type, such as bounds.
        plural: ``"s"`` for the plural.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_type(args[0], [*constraints, *args[1:]], plural)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in args)
    if origin in (Union, UnionType):
        return " or ".join(_name_type(each, constraints) for each in args if each is not NoneType)
    if origin is list:
        return f"list{plural} of {_name_type(args[0], [], 's')}"
    is_path = any(isinstance(each, PathMark) for each in constraints)
    name = ("path" if is_path else TYPES[origin or annotation]) + plural
    flat = list(_flatten_constraints(constraints))
    bounds = [f"{sign} {getattr(each, key):g}" for each in flat for key, sign in BOUNDS.items() if hasattr(each, key)]
    return " ".join([name, " and ".join(bounds)]).rstrip()


def _flatten_constraints(constraints: list[Any]) -> Iterator[Any]:
    """Yield constraints. For a nested pydantic field, yield its constraints."""
    for each in constraints:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]
