"""`data adopt` of data in an object store, which boto3 reads from a server on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_store import serve_bucket
from test_data_adopt import (
    TRAIN,
    VAL,
    Called,
    adopt,
    change_a_byte,
    fault_of,
    pixels_of,
    read_split,
    write_both,
)

from bigincubate.config import load_recipe
from bigincubate.data.adopt import adopt_dataset
from bigincubate.data.dataset import open_dataset
from bigincubate.data.local_staging import use_local_cache
from bigincubate.data.verification import find_damaged_shards


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_data_in_an_object_store_is_adopted_and_downloaded_when_it_is_read(
    tmp_path: Path, compression: str | None, monkeypatch: pytest.MonkeyPatch, call: Called
) -> None:
    mds = write_both(tmp_path / "buckets" / "bucket" / "mds", compression=compression)
    local, out = adopt(mds, tmp_path / "local", parts=2), tmp_path / "out"
    words = ("data", "adopt", "s3://bucket/mds/", "--columns", "image=photo,label=y", "--parts", 2, "--jobs", 1)
    with serve_bucket(tmp_path / "buckets", monkeypatch) as asked:
        code, _, err = call(*words)
        assert (code, err) == (
            2,
            "bigincubate: s3://bucket/mds cannot be written; name a folder for the description with --out DIR\n",
        )
        asked.clear()
        code, printed, err = call(*words, "--out", out)
        assert (code, err) == (0, "")
        assert printed.splitlines()[-1].endswith(f"use it with --set data.path={out}")
        shards = [f"/bucket/mds/{file.relative_to(mds)}" for file in mds.rglob("shard.*")]
        assert sorted(asked) == sorted([*shards, *(f"/bucket/mds/{split}/index.json" for split in ("train", "val"))])
        assert not list(out.rglob("*.mds*"))
        info = open_dataset(out)
        assert (info.digest, info.parts) == (local.digest, local.parts)
        for split, samples in (("train", TRAIN), ("val", VAL)):
            assert read_split(info, split) == pixels_of(samples)
        part = open_dataset(out / "parts" / "00")
        assert read_split(part, "train") == read_split(open_dataset(local.path / "parts" / "00"), "train")
        recipe = load_recipe("digits", [f"data.path={out}", f"data.local_cache={tmp_path / 'disk'}"])
        with use_local_cache(recipe, info) as (staged, copy):
            assert read_split(copy, "val", remote=staged.data.remote) == pixels_of(VAL)
        asked.clear()
        assert read_split(open_dataset(out), "train") == pixels_of(TRAIN)
        assert call(*words, "--out", out)[0] == 0  # checks the indexes only
        assert all(path.endswith("index.json") for path in asked)
        assert list(find_damaged_shards(info)) == []
        shard = next(out.joinpath("train").rglob("*.mds"))
        change_a_byte(shard)
        assert [file for file, _ in find_damaged_shards(info)] == [shard]
        shard.unlink()
        change_a_byte(stored := next(file for file in (mds / "train").iterdir() if file.name.startswith(shard.name)))
        assert f"s3://bucket/mds/train/{stored.name} is damaged" in fault_of(lambda: read_split(info, "train"))


def test_url_without_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("bucket").mkdir()
    with serve_bucket(tmp_path, monkeypatch):
        message = fault_of(lambda: adopt_dataset("s3://bucket/none", tmp_path / "out"))
    assert message.startswith("cannot download s3://bucket/none/train/index.json: ")
    assert "Unsupported" in fault_of(lambda: adopt_dataset("nfs2://bucket/none", tmp_path / "out"))
    assert not tmp_path.joinpath("out").exists()


def test_description_cannot_be_written_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Called) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call("data", "adopt", "s3://bucket/mds", "--out", "s3://bucket/out")
    assert (code, err) == (2, "bigincubate: s3://bucket/out: expected a file or folder on this machine, not a URL\n")
    assert not list(tmp_path.iterdir())
