"""Check the types of what was read from the files of a run directory. Damaged objects are not used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from ..config import PHASES

MAX_COUNT = 10**30  # larger integers in a file are damage: the largest training run so far used less than 1e27 FLOPs


@dataclass(frozen=True)
class ListOf:
    """A list whose elements have one kind."""

    each: Kind


@dataclass(frozen=True)
class MapOf:
    """An object with any keys, whose values have one kind."""

    each: Kind


@dataclass(frozen=True)
class OrNone:
    """A value of one kind, or None; its key may be missing."""

    value: Kind


Kind = type | UnionType | ListOf | MapOf | OrNone | Mapping[str, "Kind"]
"""The kind of a value that was read from JSON; a float may be an integer, as in JSON."""

Types = Mapping[str, Kind]
"""The keys that an object must have, with the kind of each value; other keys are allowed."""


def has_types(value: Any, types: Types) -> bool:
    """Return whether a value that was read from JSON is an object with these keys, whose values have these kinds.

    Numbers must be finite, and integers below ``MAX_COUNT`` in magnitude.
    """
    return isinstance(value, dict) and all(
        _has_kind(value.get(key), kind) and (key in value or isinstance(kind, OrNone)) for key, kind in types.items()
    )


def _has_kind(value: Any, kind: Kind) -> bool:
    if isinstance(kind, ListOf):
        return isinstance(value, list) and all(_has_kind(each, kind.each) for each in value)
    if isinstance(kind, MapOf):
        return isinstance(value, dict) and all(_has_kind(each, kind.each) for each in value.values())
    if isinstance(kind, OrNone):
        return value is None or _has_kind(value, kind.value)
    if isinstance(kind, Mapping):
        return has_types(value, kind)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return _is_number(value) if kind is float else isinstance(value, kind) and not _is_too_large(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not _is_too_large(value)


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= MAX_COUNT


RESULT_TYPES: Types = {
    "metrics": MapOf(float),
    "samples": int,
    "unit": str,
    "steps": int,
    "seen": int,
    "flops": int,
    "seconds": float,
}
PARTIAL_TYPES: Types = {"joined": ListOf(int), "modules": int, "metrics": MapOf(float)}
STRAGGLER_TYPES: Types = {"rank": int, "host": str, "ratio": float}
METRIC_TYPES: Types = {"step": int}
REQUEUE_TYPES: Types = {"time": float, "job": str, "code": int, "checkpoint": int | None, "reason": str}
EVENT_TYPES: Types = {"time": float, "event": str}
ATTEMPT_TYPES: Types = {
    "state": str,
    "time": float,
    "host": str,
    "pid": int,
    "job": str | None,
    "error": OrNone(str),
    "sharding": str,
    "device": str,
    "world": int,
    "threads": int,
    "versions": MapOf(str),
}
PLAN_TYPES: Types = {
    "data": str,
    "target_depths": ListOf(ListOf(int)),
    "meta_depths": ListOf(ListOf(int)),
    "incubation_flops": int,
    "end_to_end_flops": int,
    "finetune_share": float,
    "initial_weights": OrNone({"source": str, "flops": int | None}),
    "rows": ListOf(
        {
            "key": str,
            "phase": str,
            "module": int | None,
            "title": str,
            "metrics": ListOf({"name": str, "title": str, "unit": str, "format": str}),
            "unit": str,
            "cost": {"parameters": int, "forward_flops": int, "training_flops": int, "allreduce_bytes": int},
            "batch_size": int,
            "batch_units": int,
            "steps": int,
            "stable_steps": int,
            "epochs": float,
            "total_flops": int,
            "identity": dict,
            "data": str,
        }
    ),
}


def is_plan(value: Any) -> bool:
    """Return whether a value is the content of a ``plan.json``.

    Each row must be a phase with a metric and a positive batch size, and have a module exactly if it is an incubation.
    Fine-tuning and end-to-end training must be among them.
    """
    if not has_types(value, PLAN_TYPES):
        return False
    rows = value["rows"]
    found = {row["phase"] for row in rows}
    return {"finetune", "end_to_end"} <= found <= set(PHASES) and all(
        (row["phase"] == "incubate") == (row["module"] is not None)
        and (row["metrics"] and row["batch_size"] > 0 and row["batch_units"] > 0)
        for row in rows
    )


def keep_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose values are all numbers, including infinities and NaN, with integers below ``MAX_COUNT``."""
    return [row for row in rows if all(map(_is_number, row.values()))]
