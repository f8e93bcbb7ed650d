"""Data that is copied to a disk of the node, shared there, and taken away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.config import Recipe, load_recipe
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.errors import ExternalError


@pytest.fixture
def given(fast: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, DatasetInfo]:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    return load_recipe(str(fast), ["data.local_cache=$NODE_DISK/mine"]), open_dataset(digits)


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "disk" / "mine").glob("bigincubate-*"))


def test_shards_are_copied_when_read_and_removed_with_the_last_reader(given: Any, tmp_path: Path) -> None:
    from bigincubate.data.local_staging import use_local_cache
    from bigincubate.data.shards import Shards
    from bigincubate.tasks.image_classification.views import LabelledImages

    recipe, info = given
    decoder = LabelledImages(10)
    with use_local_cache(recipe, info) as (here, copy):
        assert here.identity == recipe.identity
        assert copies(tmp_path) == [copy.path]
        assert list(copy.path.rglob("*.mds")) == []
        with use_local_cache(recipe, info) as (other, same):
            assert same.path == copy.path
            read = Shards(same, "val", decoder, remote=other.data.remote).read(3)
        assert list(copy.path.glob("val/**/*.mds")) != []  # the other one has left, this one still reads
        assert read[1] == Shards(info, "val", decoder).read(3)[1]
        assert read[0].tobytes() == Shards(info, "val", decoder).read(3)[0].tobytes()
    assert copies(tmp_path) == []


def test_shards_of_killed_readers_are_removed_by_the_next(given: Any, tmp_path: Path) -> None:
    from bigincubate.data.local_staging import use_local_cache

    recipe, info = given
    with pytest.raises(RuntimeError), use_local_cache(recipe, info) as (_, copy):
        raise RuntimeError
    copy.path.mkdir()
    (copy.path / "left").touch()
    with use_local_cache(recipe, info):
        pass
    assert copies(tmp_path) == []


@pytest.mark.parametrize(
    ("cache", "gib", "words"),
    [
        ("$NODE_DISK", 1e-9, "allowed by data.local_cache_gib"),
        ("$NO_SUCH_DISK/x", 1, "data.local_cache = .*NO_SUCH_DISK is not set"),
    ],
)
def test_data_that_cannot_be_staged_is_refused(given: Any, cache: str, gib: float, words: str) -> None:
    from bigincubate.data.local_staging import use_local_cache

    recipe, info = given
    data = recipe.data.model_copy(update={"local_cache": cache, "local_cache_gib": gib})
    with pytest.raises(ExternalError, match=words), use_local_cache(recipe.model_copy(update={"data": data}), info):
        pass


def test_training_from_a_copy_gives_the_same_weights(
    harness: Callable[..., Any], tmp_path: Path, bigincubate: Callable[..., Any]
) -> None:
    plain, copied = harness(), harness()
    plain.train("pretrain")
    ended = bigincubate(*copied.command("pretrain"), "--set", f"data.local_cache={tmp_path}/disk/mine")
    assert ended.returncode == 0, ended.stderr
    digests = [
        json.loads((one.run.phase("pretrain").artifact / "manifest.json").read_text())["digest"]
        for one in (plain, copied)
    ]
    assert digests[0] == digests[1]
    assert copies(tmp_path) == []
    assert (tmp_path / "disk" / "mine").exists()
