"""Walk the schema by dotted key, and the marks of fields that the walk needs: overriding tables, and paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from ..files import expand_path


@dataclass(frozen=True)
class OverridesOf:
    """Marks a table of a phase or a job whose keys override those of ``table``."""

    table: type[BaseModel]


@dataclass(frozen=True)
class PathMark:
    """Marks a key whose value is a path. See `resolve_paths` for the rule that all of them follow.

    Attributes:
        unless: Regular expression of values that are not paths, such as URLs or names.
        on_node: Whether ``~`` and environment variables are expanded where the path is used, on the node of a job.
    """

    unless: str | None = None
    on_node: bool = False

    def resolve(self, text: str, base: Path) -> str:
        """Return an absolute path for a value that is a path; ``base`` is the folder that it is relative to."""
        if self.unless is not None and re.fullmatch(self.unless, text):
            return text
        if not self.on_node:
            return str(expand_path(text, base))
        return text if text.startswith(("~", "$")) else os.path.join(base, text)


PathText = Annotated[str, PathMark()]


def iterate_fields(table: type[BaseModel], key: str) -> Iterator[FieldInfo]:
    """Yield the fields of the schema along a dotted key, from ``table`` on, as far as the schema knows them."""
    inner: type[BaseModel] | None = table
    for part in key.split("."):
        field = inner.model_fields.get(part) if inner is not None else None
        if field is None:
            return
        yield field
        inner = inner_table(field)


def find_field(table: type[BaseModel], key: str) -> FieldInfo | None:
    """Return the field of a dotted key; None if the schema has no such key, as inside of ``model.args``."""
    fields = list(iterate_fields(table, key))
    return fields[-1] if len(fields) == key.count(".") + 1 else None


def inner_table(field: FieldInfo) -> type[BaseModel] | None:
    """Return the table that a field contains or overrides, or None if it is not a table of the schema."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return field.annotation
    return next((mark.table for mark in field.metadata if isinstance(mark, OverridesOf)), None)


def find_path_mark(field: FieldInfo) -> PathMark | None:
    """Return the mark of a field whose value is a path, or None."""
    members = _union_members(field.annotation)
    found = [*field.metadata, *(mark for kind in members for mark in getattr(kind, "__metadata__", ()))]
    return next((mark for mark in found if isinstance(mark, PathMark)), None)


def _union_members(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def list_alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, or the only type, without their constraints."""
    members = _union_members(annotation)
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in members]


def takes_text(annotation: Any) -> bool:
    """Return whether a type accepts text: a string, or one of several strings."""
    return any(kind is str or get_origin(kind) is Literal for kind in list_alternatives(annotation))


def takes_list(annotation: Any) -> bool:
    """Return whether a type accepts a list."""
    return any(get_origin(kind) is list for kind in list_alternatives(annotation))


def resolve_paths(table: type[BaseModel], values: dict[str, Any], base: Path, prefix: str = "") -> dict[str, Any]:
    """Return tables of a recipe with absolute paths.

    In the value of every key that is marked as a path, ``~`` and environment variables are expanded. A relative path is
    relative to ``base``: the folder of the recipe file, or the working directory for ``--set``.

    Args:
        table: Schema of ``values``.
        values: The tables, not validated yet.
        base: An absolute path.
        prefix: Dotted key of the table, with a dot at the end; empty for a whole recipe.

    Raises:
        ConfigError: A path is empty, has a NUL character, or names an environment variable that is not set.
    """
    out = dict(values)
    for name, value in values.items():
        if (field := table.model_fields.get(name)) is None:
            continue
        if isinstance(value, str) and (mark := find_path_mark(field)) is not None:
            try:
                out[name] = mark.resolve(value, base)
            except ConfigError as error:
                raise ConfigError(f"{prefix}{name}: {error}") from None
        elif isinstance(value, dict) and (inner := inner_table(field)) is not None:
            out[name] = resolve_paths(inner, value, base, f"{prefix}{name}.")
    return out
