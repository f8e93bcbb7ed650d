"""Data that cannot be read: no message calls it damaged or advises to delete it, and no part of it is left out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from denied import deny, solution_for
from image_trees import write_tree
from mds_files import make_samples, write_mds
from text_files import write_texts

from bigincubate.data.adopt import adopt_dataset
from bigincubate.data.dataset import open_dataset
from bigincubate.data.partitions import partition_by_hash
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.text.prepare import prepare_text
from bigincubate.data.verification import find_damaged_shards, hash_all_shards
from bigincubate.errors import DataError, SystemResourceError

FILES = ["dataset.json", "train/index.json", "val/00000/shard.00000.mds"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset(str(write_tree(folder / "images", 6)), folder / "data")
    return folder / "data"


def message_of(path: Path, denied: Path | None = None) -> str:
    return f"{path}: Permission denied; {solution_for(path, denied or path)}"


@pytest.mark.parametrize("name", [*FILES, "train", "train/00000"])
def test_unreadable_data_is_neither_missing_nor_damaged(
    name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"train": "train/index.json", "train/00000": "train/00000/shard.00000.mds"}.get(name, name)
    deny(monkeypatch, prepared / name)
    with pytest.raises(SystemResourceError, match=f"^{message_of(prepared / file, prepared / name)}$"):
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


def test_folder_of_data_that_is_unreadable_is_named(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, prepared)
    with pytest.raises(SystemResourceError, match=f"^{message_of(prepared / 'dataset.json', prepared)}$"):
        open_dataset(prepared)


@pytest.mark.parametrize("link", ["dataset.json", "train/index.json"])
def test_link_in_data_is_not_advised_to_be_deleted(link: str, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / link).rename(tmp_path / "moved.json")
    (data / link).symlink_to(tmp_path / "moved.json")
    with pytest.raises(DataError, match=r"; replace the link with the file that it leads to$"):
        open_dataset(data)


def test_part_that_is_a_pipe_is_damaged(tmp_path: Path) -> None:
    images = str(write_tree(tmp_path / "images", 6))
    prepare_dataset(images, tmp_path / "data", partition=lambda samples: partition_by_hash(samples, 2))
    shard = tmp_path / "data/parts/00/train/00000/shard.00000.mds"
    shard.unlink()
    os.mkfifo(shard)  # reading it would never end
    problem = "not a file but a folder, pipe or device"
    assert list(find_damaged_shards(open_dataset(tmp_path / "data"))) == [(shard, problem)]


@pytest.fixture
def mds(tmp_path: Path) -> Path:
    """Data of mosaicml-streaming, whose training split is in two folders."""
    samples = make_samples(12)
    for place in ("train/0", "train/1", "val"):
        write_mds(tmp_path / "mds" / place, samples)
    return tmp_path / "mds"


@pytest.mark.parametrize("name", ["train/1", "train", "train/0/index.json", "val/shard.00000.mds.zstd"])
def test_data_to_adopt_is_read_completely(
    name: str, mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"image": "photo", "label": "y"}
    with monkeypatch.context() as patch:
        deny(patch, mds / name)
        with pytest.raises(SystemResourceError, match=rf"^{mds}.*: Permission denied; change "):
            adopt_dataset(mds, tmp_path / "out", columns=columns)
    assert adopt_dataset(mds, tmp_path / "out", columns=columns).samples == {"train": 24, "val": 12}


def test_shard_to_adopt_that_is_a_pipe_is_refused(mds: Path, tmp_path: Path) -> None:
    shard = mds / "val/shard.00000.mds.zstd"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DataError, match=f"^{shard}: not a file but a folder, pipe or device$"):
        adopt_dataset(mds, tmp_path / "out", columns={"image": "photo", "label": "y"})


def test_text_is_read_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_texts(tmp_path / "texts"), tmp_path / "data"
    with monkeypatch.context() as patch:
        deny(patch, source / "b")
        with pytest.raises(SystemResourceError, match=f"^{message_of(source / 'b')}$"):
            prepare_text(str(source), out, window=64)
    assert prepare_text(str(source), out, window=64).schema.metadata["domains"] == ["a", "b", "c"]
