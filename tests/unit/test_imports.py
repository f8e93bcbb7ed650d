"""Objects loaded by a name in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigincubate.config.objects import load_object
from bigincubate.errors import ConfigError


def test_load_object_returns_the_attribute() -> None:
    assert load_object("pathlib:Path", key="loss.name") is Path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pathlib.Path", "expected package.module:attribute"),
        ("pathlib:Path()", "expected package.module:attribute"),
        ("no_such_package.losses:mine", "cannot import no_such_package.losses"),
        ("pathlib:Paht", "pathlib has no attribute 'Paht'"),
    ],
)
def test_load_object_bad_name_gives_one_line_with_key_and_value(name: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_object(name, key="loss.name")
    assert str(error.value).startswith(f"loss.name = {name!r}: {problem}")
    assert "\n" not in str(error.value)
