"""Class folders packed as tar or zip: the same data as if they had been unpacked, read where they are."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from image_trees import read_contents as contents
from image_trees import write_tree

from bigincubate.data import prepare as preparing
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources import read_source
from bigincubate.errors import DataError, SystemResourceError


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 16)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two splits with files that are no images, of all reasons to skip one."""
    root = tmp_path / "tree"
    for split, count in (("train", 20), ("val", 4)):
        write_tree(root / split, count)
    for number, file in enumerate(sorted((root / "val").rglob("*.png"))):
        file.write_bytes(file.read_bytes() + bytes([number]))  # not equal to an image of training
    (root / "train" / "a" / "deep" / "er").mkdir(parents=True)
    shutil.move(root / "train" / "a" / "0001.png", root / "train" / "a" / "deep" / "er" / "no suffix")
    thumbnails = ("train/b/@eaDir/t.png", "val/c/thumbnails/t.png")
    for name in (".git/x.png", "train/.hidden.png", "train/b/._1.png", *thumbnails):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train" / "a" / "0000.png", root / name)
    for name in ("README", "train/notes.txt", "train/c/x.heic", "val/stray.png", "extra/list.csv"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("text")
    return root


def pack_tar(tree: Path, file: Path, arcname: str, form: int = tarfile.PAX_FORMAT) -> Path:
    file = file.with_suffix(".tar")
    with tarfile.open(file, "w", format=form) as tar:
        tar.add(tree, arcname=arcname)
    return file


PACK: dict[str, Callable[[Path, Path], Path]] = {
    "tar": lambda tree, file: pack_tar(tree, file, "."),
    "ustar below a folder": lambda tree, file: pack_tar(tree, file, "my/images", tarfile.USTAR_FORMAT),
    "gnu": lambda tree, file: pack_tar(tree, file, "images", tarfile.GNU_FORMAT),
    "zip": lambda tree, file: Path(shutil.make_archive(str(file), "zip", tree)),
    "zip below a folder": lambda tree, file: Path(shutil.make_archive(str(file), "zip", tree.parent, tree.name)),
}


@pytest.mark.parametrize("form", PACK)
def test_packed_class_folders_are_the_data_of_the_folder(tree: Path, tmp_path: Path, form: str) -> None:
    lines: dict[str, list[str]] = {"folder": [], "packed": []}
    folder = prepare_dataset(str(tree), tmp_path / "folder", report=lines["folder"].append)
    (tmp_path / "away").mkdir()
    packed_file = PACK[form](tree, tmp_path / "away" / "x")
    shutil.move(tree, tmp_path / "gone")  # only the archive is read
    packed = prepare_dataset(str(packed_file), tmp_path / "packed", jobs=2, report=lines["packed"].append)
    assert packed.digest == folder.digest
    assert contents(tmp_path / "packed" / "train") == contents(tmp_path / "folder" / "train")
    assert lines["packed"] == lines["folder"]
    assert read_source(str(packed_file), 0.2).notes["skipped"] == {
        **{".heic (not read: convert them to PNG or JPEG)": 1, ".txt": 1, "hidden files": 2, "in folders .git": 1},
        **{"images outside of the class folders": 1, "in folders @eaDir": 1, "in folders thumbnails": 1},
        "suffixless": 1,
    }
    # data that was prepared from the folder is recognized as that of the archive
    assert prepare_dataset(str(packed_file), tmp_path / "folder") == folder


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_held_out_images_are_those_of_the_folder(tmp_path: Path, form: str) -> None:
    tree = write_tree(tmp_path / "tree", 30)
    packed = PACK[form](tree, tmp_path / "x")
    digests = {prepare_dataset(str(source), tmp_path / f"out-{source.name}").digest for source in (tree, packed)}
    assert len(digests) == 1


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_preparation_of_an_archive_resumes_and_lists_unreadable_images(
    tmp_path: Path, small_chunks: None, form: str
) -> None:
    tree = write_tree(tmp_path / "tree", 60)
    whole = prepare_dataset(str(tree), tmp_path / "whole")
    good = (tree / "b" / "0003.png").read_bytes()
    (tree / "b" / "0003.png").write_bytes(good[:80])
    packed = PACK[form](tree, tmp_path / "x")
    with pytest.raises(DataError, match=rf"1 image cannot be read: {packed}/b/0003\.png: .*--skip-bad"):
        prepare_dataset(str(packed), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert str(packed) in json.loads((tmp_path / "out" / ".preparing.json").read_text())["source"]["folder"]

    (tree / "b" / "0003.png").write_bytes(good)
    stamp = packed.stat().st_mtime_ns
    PACK[form](tree, tmp_path / "x")
    os.utime(packed, ns=(stamp, stamp))
    seen: list[int] = []
    info = prepare_dataset(str(packed), tmp_path / "out", on_progress=lambda done, _: seen.append(done))
    assert seen[0] >= 180 - 40  # the chunk of the image is written again
    assert info.digest == whole.digest
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "whole").keys()


def test_archive_that_changed_is_noticed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 5)
    packed = PACK["tar"](tree, tmp_path / "x")
    info = prepare_dataset(str(packed), tmp_path / "out")
    os.utime(packed)  # another time only
    assert prepare_dataset(str(packed), tmp_path / "out") == info
    shutil.copy(tree / "a" / "0000.png", tree / "b" / "0000.png")
    PACK["tar"](tree, tmp_path / "x")
    with pytest.raises(DataError, match="added, removed or changed since"):
        prepare_dataset(str(packed), tmp_path / "out")


def test_images_are_not_read_before_all_names_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree", 5)
    for form in ("tar", "zip"):
        packed = PACK[form](tree, tmp_path / "x")
        with monkeypatch.context() as patch:
            patch.setattr("bigincubate.data.sources.slices._read_at", lambda *place: pytest.fail("an image was read"))
            patch.setattr("bigincubate.data.images.decode_image", lambda *place: pytest.fail("an image was decoded"))
            source = read_source(str(packed), 0.2)
            assert source.fingerprint
        assert [len(samples) for samples in source.splits.values()] == [12, 3]


# ------------------------------------------------------------------------------------------------ compressed


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_is_the_data_of_the_folder_and_leaves_nothing_unpacked(tmp_path: Path, mode: str) -> None:
    tree = write_tree(tmp_path / "tree", 30)
    packed = tmp_path / f"x.tar.{mode}"
    with tarfile.open(packed, f"w:{mode}") as tar:  # type: ignore[call-overload]
        tar.add(tree, arcname="images")
    lines: list[str] = []
    info = prepare_dataset(str(packed), tmp_path / "out", jobs=2, report=lines.append)
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    assert info.digest == folder.digest
    assert lines[0].startswith(f"x.tar.{mode} is compressed, so it is read twice, and takes 0.000 GB in ")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "folder").keys()
    lines.clear()
    os.utime(packed)  # the contents are compared
    assert prepare_dataset(str(packed), tmp_path / "out", report=lines.append) == info
    assert "is read twice" in lines[0]
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "folder").keys()


def test_compressed_tar_is_unpacked_once_and_named_in_messages(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(tmp_path / "tree", 60)
    (tree / "b" / "0003.png").write_bytes(b"no image")
    packed = tmp_path / "x.tgz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tree, arcname=".")
    cut = {"parts": lambda train: [list(train[::2]), list(train[1::2])]}
    with pytest.raises(DataError, match=rf"1 image cannot be read: {packed}/b/0003\.png: "):
        prepare_dataset(str(packed), tmp_path / "out", partition=cut["parts"])
    monkeypatch.setattr("bigincubate.data.unpacking._unpack", lambda *_: pytest.fail("it was unpacked again"))
    info = prepare_dataset(str(packed), tmp_path / "out", partition=cut["parts"], skip_bad=True)
    assert len(info.parts) == 2
    assert not (tmp_path / "out" / ".unpacked").exists()


def test_compressed_tar_that_fits_nowhere_or_is_truncated_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "x.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(write_tree(tmp_path / "tree", 30), arcname=".")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SystemResourceError, match=r"is compressed and unpacks to 0\.000 GB, for which .* has no space"):
        prepare_dataset(str(packed), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    packed.write_bytes(packed.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"x\.tar\.gz is damaged: "):
        prepare_dataset(str(packed), tmp_path / "out")


def test_checksum_of_a_compressed_tar_is_verified(tmp_path: Path) -> None:
    packed = tmp_path / "x.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(write_tree(tmp_path / "tree", 30), arcname=".")
    data = bytearray(packed.read_bytes())
    data[-8] ^= 1  # of the checksum; Python's own reader of tar files does not read it
    packed.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar\.gz is damaged: CRC check failed"):
        prepare_dataset(str(packed), tmp_path / "out")
    assert not (tmp_path / "out").exists()
