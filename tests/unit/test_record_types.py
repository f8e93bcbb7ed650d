"""Types of what is read from files: damaged objects are told from those that this program wrote."""

from __future__ import annotations

from typing import Any

import pytest
from records import make_plan

from bigincubate.storage.record_types import ListOf, MapOf, OrNone, Types, has_types, is_plan, keep_numbers


@pytest.mark.parametrize(
    ("types", "valid", "damaged"),
    [
        ({"a": int}, [{"a": 1}, {"a": -(10**29), "b": None}], [{}, {"a": 1.0}, {"a": "1"}, {"a": 10**30}, [], 5, None]),
        (
            {"a": float},
            [{"a": 1}, {"a": 1e308}],
            [{"a": float("nan")}, {"a": float("inf")}, {"a": 10**30}],
        ),
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


def test_rows_of_metrics_may_be_infinite_or_large() -> None:
    """The perplexity of a language model that has diverged is up to 1e304."""
    rows: list[dict[str, Any]] = [{"loss": value} for value in (float("nan"), float("inf"), 1, 1e304)]
    assert keep_numbers([*rows, {"loss": "1"}, {"loss": None}, {"step": 10**30}, {"step": 10**400}]) == rows
    assert has_types({"metrics": {"perplexity": 1e304}}, {"metrics": MapOf(float)})


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (["finetune", "end_to_end"], True),
        (["pretrain", "incubate/0", "finetune", "end_to_end"], True),
        ([], False),
        (["pretrain", "finetune"], False),
        (["incubate", "finetune", "end_to_end"], False),
        (["finetune/0", "end_to_end"], False),
        (["other", "finetune", "end_to_end"], False),
    ],
)
def test_plan_without_its_last_phases_is_damaged(phases: list[str], expected: bool) -> None:
    plan = make_plan(*phases)
    plan["rows"] = [row for row in plan["rows"] if row["key"] in phases]
    assert is_plan(plan) is expected


@pytest.mark.parametrize("key", ["batch_size", "batch_units"])
def test_plan_with_empty_batches_is_damaged(key: str) -> None:
    assert not is_plan(make_plan("pretrain", **{key: 0}))
