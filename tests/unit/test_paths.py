"""Paths that a user writes: what is expanded, what they are relative to, and that every one follows the same rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import is_path, iterate_commands

from bigincubate.config import Recipe, load_recipe
from bigincubate.config.schema import find_field, find_path_mark
from bigincubate.errors import ConfigError
from bigincubate.files import expand_path
from bigincubate.storage.run_directory import RunDir

PATH_KEYS = (
    "data.path",
    "data.remote",
    "data.local_cache",
    "meta.init",
    "finetune.init",
    "sharding.deepspeed_config",
    "finetune.sharding.deepspeed_config",
    "slurm.setup_script",
    "slurm.python",
    "slurm.host_python",
)
NOT_PATHS = {
    "data.remote": "s3://bucket/x",
    "meta.init": "timm:vit_tiny_patch16_224",
    "finetune.init": "transformers:gpt2",
    "sharding.deepspeed_config": "zero1",
    "slurm.python": "python3",
    "slurm.host_python": "python3",
}


def value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is not the folder of the recipe; HOME and SITE are set."""
    for name in ("home", "site", "work", "recipes"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SITE", str(tmp_path / "site"))
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/a", "home/a"),
        ("$SITE/a", "site/a"),
        ("${SITE}/a", "site/a"),
        ("a/$USERS$", "work/a/$USERS$"),
        ("../a", "a"),
        ("a/~", "work/a/~"),
    ],
)
def test_path_is_expanded_and_absolute(text: str, expected: str, elsewhere: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("USERS", "$USERS")  # a value is not expanded again
    if "$USERS" in text:
        with pytest.raises(ConfigError, match="USERS is not set"):
            expand_path(text)
        return
    assert expand_path(text) == elsewhere / expected
    assert expand_path(expand_path(text)) == expand_path(text)


@pytest.mark.parametrize("text", ["", "a\0b", "$NOT_SET/a", "a/${NOT_SET}", "a\udcff"])
def test_text_that_is_no_path_is_refused(text: str, elsewhere: Path) -> None:
    with pytest.raises(ConfigError):
        expand_path(text)


@pytest.mark.parametrize("key", PATH_KEYS)
def test_recipe_path_is_relative_to_the_recipe_and_set_to_the_working_directory(key: str, elsewhere: Path) -> None:
    table, _, name = key.rpartition(".")
    file = elsewhere / "recipes" / "mine.toml"
    file.write_text(f'base = "digits"\n[{table}]\n{name} = "../a/b"\n')
    assert Path(value_of(load_recipe(file), key)).resolve() == elsewhere / "a/b"
    assert value_of(load_recipe("../recipes/mine.toml", [f"{key}=a/b"]), key) == str(elsewhere / "work/a/b")
    if key != "data.local_cache":  # expanded by the node that uses it
        assert value_of(load_recipe("digits", [f"{key}=~/b"]), key) == str(elsewhere / "home/b")
        assert value_of(load_recipe("digits", [f"{key}=$SITE/b"]), key) == str(elsewhere / "site/b")
        with pytest.raises(ConfigError, match=rf"{key}: the environment variable \$NOT_SET is not set"):
            load_recipe("digits", [f"{key}=$NOT_SET/b"])
    else:
        assert value_of(load_recipe("digits", [f"{key}=$NOT_SET/b"]), key) == "$NOT_SET/b"


@pytest.mark.parametrize("key", NOT_PATHS)
def test_name_or_url_is_kept(key: str, elsewhere: Path) -> None:
    assert value_of(load_recipe("digits", [f"{key}={NOT_PATHS[key]}"]), key) == NOT_PATHS[key]


def test_every_key_that_is_a_path_by_its_description_is_marked() -> None:
    from bigincubate.config import list_recipe_keys

    entries = list_recipe_keys()
    marked = {entry.key for entry in entries if find_path_mark(find_field(Recipe, entry.key))}  # type: ignore[arg-type]
    assert marked == set(PATH_KEYS) - {"finetune.sharding.deepspeed_config"}
    words = re.compile(r"\b(?<!drop-)(path|folder|file|script|interpreter)\b", re.IGNORECASE)
    described = {entry.key for entry in entries if words.search(entry.meaning.replace("`data.path`", ""))}
    assert described - marked == set()


def test_every_option_that_is_a_path_is_parsed_by_the_rule(elsewhere: Path) -> None:
    paths = [each for _, parameters in iterate_commands() for each in parameters if is_path(each)]
    assert len(paths) > 20
    for parameter in paths:
        assert parameter.info.parser is not None, parameter.name
        found = parameter.info.parser("~/x")
        assert str(getattr(found, "path", found)) == str(elsewhere / "home/x")


def test_run_directory_stores_absolute_paths_and_is_used_from_elsewhere(
    elsewhere: Path, call: Callable[..., Any], digits: Path, smoke: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "recipes/data").symlink_to(digits)
    smoke.write_text(smoke.read_text().replace('source = "digits-dev"', 'path = "data"'))
    recipe = smoke.rename(elsewhere / "recipes/mine.toml")
    code, _, err = call("plan", "../recipes/mine.toml", "--json")
    assert (code, err) == (0, "")
    from bigincubate.planning.context import open_run

    open_run(load_recipe("../recipes/mine.toml"), RunDir(expand_path("run")))
    stored = RunDir(elsewhere / "work/run").load_recipe()
    assert stored.data.path == str(elsewhere / "recipes/data")
    monkeypatch.chdir(elsewhere)
    assert open_run(stored, RunDir(elsewhere / "work/run")).data.path == elsewhere / "recipes/data"
    assert not (elsewhere / "work/run/data").exists()
    assert recipe.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("status", "nowhere"),
        ("plan", "nowhere.toml"),
        ("evaluate", "nowhere", "--data", "nowhere"),
        ("export", "nowhere", "--out", "x"),
        ("report", "nowhere"),
        ("compare", "nowhere"),
        ("verify", "nowhere"),
        ("resume", "nowhere"),
        ("checkpoint", "list", "nowhere"),
        ("data", "prepare", "nowhere", "--out", "x"),
        ("data", "prepare", "digits", "--out", "x", "--by", "nowhere"),
        ("import", "digits", "nowhere", "--as", "meta", "--to", "x"),
        ("plan", "digits", "--cluster", "nodes=1,gpus=1,rates=nowhere"),
        ("train", "imagenet-vit-b", "--run-dir", "x", "--phase", "pretrain", "--set", "data.path=nowhere"),
    ],
)
def test_message_about_a_missing_path_shows_the_absolute_path(
    words: tuple[str, ...], elsewhere: Path, call: Callable[..., Any]
) -> None:
    code, _, err = call(*words)
    assert code in (2, 3, 4)
    assert str(elsewhere / "work/nowhere") in err
