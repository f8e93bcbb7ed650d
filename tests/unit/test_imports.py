"""Objects loaded by a name in a recipe."""

from __future__ import annotations

from os import fspath
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


def test_load_object_names_the_arguments_that_do_not_fit() -> None:
    assert load_object("os:fspath", "path", key="loss.name") is fspath
    with pytest.raises(ConfigError, match=r"^loss.name = 'os:getcwd': it cannot be called with \(logits, labels\)"):
        load_object("os:getcwd", "logits", "labels", key="loss.name")
