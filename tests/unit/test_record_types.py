"""Types of what is read from files: damaged objects are told from those that this program wrote."""

from __future__ import annotations

from typing import Any

import pytest

from bigincubate.storage.record_types import ListOf, MapOf, OrNone, Types, has_phases, has_types, keep_numbers


@pytest.mark.parametrize(
    ("types", "valid", "damaged"),
    [
        ({"a": int}, [{"a": 1}, {"a": -(10**29), "b": None}], [{}, {"a": 1.0}, {"a": "1"}, {"a": 10**31}, [], 5, None]),
        ({"a": float}, [{"a": 1}, {"a": 0.5}], [{"a": float("nan")}, {"a": float("inf")}, {"a": 1e30}, {"a": None}]),
        ({"a": str | None}, [{"a": "x"}, {"a": None}], [{}, {"a": 5}, {"a": []}]),
        ({"a": ListOf(int)}, [{"a": []}, {"a": [1, 2]}], [{}, {"a": "12"}, {"a": [1, "2"]}, {"a": {"0": 1}}]),
        ({"a": MapOf(float)}, [{"a": {}}, {"a": {"x": 1}}], [{"a": []}, {"a": {"x": "1"}}, {"a": {"x": None}}]),
        ({"a": OrNone({"b": int})}, [{}, {"a": None}, {"a": {"b": 1}}], [{"a": {}}, {"a": {"b": "1"}}, {"a": 1}]),
        ({"a": ListOf({"b": ListOf(str)})}, [{"a": [{"b": ["x"]}]}], [{"a": [{}]}, {"a": [{"b": [1]}]}]),
    ],
    ids=["integer", "number", "text or none", "list", "map", "object or none", "nested"],
)
def test_damaged_objects_are_told_from_valid_ones(types: Types, valid: list[Any], damaged: list[Any]) -> None:
    assert [has_types(value, types) for value in valid] == [True] * len(valid)
    assert [has_types(value, types) for value in damaged] == [False] * len(damaged)


def test_rows_of_metrics_may_be_infinite_but_not_absurd() -> None:
    rows: list[dict[str, Any]] = [{"loss": value} for value in (float("nan"), float("inf"), 1, 1e29)]
    assert keep_numbers([*rows, {"loss": "1"}, {"loss": None}, {"loss": 1e308}, {"loss": 10**400}]) == rows


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([("finetune", None), ("end_to_end", None)], True),
        ([("pretrain", None), ("incubate", 0), ("finetune", None), ("end_to_end", None)], True),
        ([], False),
        ([("pretrain", None), ("finetune", None)], False),
        ([("incubate", None), ("finetune", None), ("end_to_end", None)], False),
        ([("finetune", 0), ("end_to_end", None)], False),
        ([("../x", None), ("finetune", None), ("end_to_end", None)], False),
    ],
)
def test_plan_without_its_last_phases_is_damaged(phases: list[tuple[str, int | None]], expected: bool) -> None:
    assert has_phases([{"phase": phase, "module": module, "metrics": [{}]} for phase, module in phases]) is expected
