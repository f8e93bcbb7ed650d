"""What the tables of a recipe have in common: their base class, types of values, and fields of execution keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .objects import OBJECT_NAME
from .schema import PathMark

Unit = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Depth = Annotated[int, Field(ge=0)]
StageDepths = list[Depth] | list[list[Depth]]


class ConfigTable(BaseModel):
    """Base class of the tables, which are immutable and refuse unknown keys and other types."""

    # defaults are validated too, so that 0 and 0.0 are the same recipe
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    def flat(self) -> dict[str, Any]:
        """Return the value of every key that is not None, by dotted key."""
        return dict(_flatten(self.model_dump(exclude_none=True)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def execution_field(default: Any, **constraints: Any) -> Any:
    """Return a pydantic field of an execution key, which does not affect what is computed."""
    return Field(default, json_schema_extra={"execution": True}, **constraints)


def one_of_or_object(*names: str) -> AfterValidator:
    """Return a validator that accepts these names and ``package.module:attribute`` (see `load_object`)."""

    def check(value: str) -> str:
        if value not in names and not OBJECT_NAME.fullmatch(value):
            raise ValueError(f"expected {' or '.join([*names, 'package.module:attribute'])}")
        return value

    return AfterValidator(check)


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, after refusing numbers in them that are not finite."""
    for key, value in _flatten(arguments):
        values = [value]
        while values:
            if isinstance(inner := values.pop(), list | dict):
                values += inner.values() if isinstance(inner, dict) else inner
            elif isinstance(inner, float) and not math.isfinite(inner):
                raise ValueError(f"{key}: every number must be finite, not {inner}")
    return arguments


Arguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]


def _check_pretrained(value: str) -> str:
    """Return the name or path of a pretrained model."""
    if value in ("timm:", "transformers:"):
        raise ValueError('expected a path, or "timm:" or "transformers:" with the name of a model')
    return value


Pretrained = Annotated[str, PathMark(unless="(timm|transformers):.*"), AfterValidator(_check_pretrained)]
