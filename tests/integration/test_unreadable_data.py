"""Data that cannot be read: its content is unknown, so no message calls it damaged or advises to delete it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from denied import deny
from image_trees import write_tree

from bigincubate.data.dataset import open_dataset
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.verification import hash_all_shards
from bigincubate.errors import SystemResourceError

FILES = ["dataset.json", "train/index.json", "val/00000/shard.00000.mds"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset(str(write_tree(folder / "images", 6)), folder / "data")
    return folder / "data"


def message_of(path: Path) -> str:
    return f"{path}: Permission denied; make the file readable, then run the same command again"


@pytest.mark.parametrize("name", [*FILES, "train", "train/00000"])
def test_unreadable_data_is_neither_missing_nor_damaged(
    name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"train": "train/index.json", "train/00000": "train/00000/shard.00000.mds"}.get(name, name)
    deny(monkeypatch, prepared / name)
    with pytest.raises(SystemResourceError, match=f"^{message_of(prepared / file)}$"):
        hash_all_shards(open_dataset(prepared))
    monkeypatch.undo()
    hash_all_shards(open_dataset(prepared))


@pytest.mark.parametrize("name", FILES)
def test_phase_whose_data_is_unreadable_can_be_repeated(
    name: str,
    harness: Any,
    prepared: Path,
    tmp_path: Path,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    made = harness("train.max_steps=1", "train.batch_size=8", "model.num_classes=3", f"data.path={data}")
    for words in (made.command("pretrain", None), ("verify", made.run.path)):
        with monkeypatch.context() as patch:
            deny(patch, data / name)
            code, _, err = call(*words)
        assert code == 3
        assert err.splitlines()[-1] == f"bigincubate: {message_of(data / name)}"
        assert call(*words)[0] == 0
