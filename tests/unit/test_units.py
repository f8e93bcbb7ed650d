"""Numbers and times in messages and reports."""

from __future__ import annotations

from datetime import UTC

import pytest

from bigincubate.errors import format_count
from bigincubate.report.units import format_time


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1200, "image", "1,200 images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (2, "batch", "2 batches"),
    ],
)
def test_count_has_its_noun_in_the_right_number(count: int, noun: str, text: str) -> None:
    assert format_count(count, noun) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1970-01-01 00:00:00"), (1e9, "2001-09-09 01:46:40"), (1e18, "unknown"), (-1e18, "unknown")],
)
def test_time_is_unknown_if_it_is_not_a_date(seconds: float, text: str) -> None:
    assert format_time(seconds, UTC) == text
