"""ImageNet as it is published, in small: the layout of its archives, written by `tarfile` and by SciPy."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_trees import write_tree
from PIL import Image

from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources.imagenet import DEVKITS, TRAIN, VAL
from bigincubate.errors import DataError

# number of a class and WordNet ID: the numbers are not in the order of the IDs
CLASSES = {1: "n02119789", 2: "n02100735", 3: "n01440764"}
WORDS = {1: "kit fox, Vulpes macrotis", 2: "English setter", 3: "tench, Tinca tinca"}
TRUTH = [3, 1, 2, 2, 1, 3]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_devkit(folder: Path, truth: list[int]) -> None:
    from scipy.io import savemat

    fields = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", object),
    ]
    rows = [(number, CLASSES[number], WORDS[number], "a gloss", 0) for number in CLASSES]
    rows.append((4, "n00001740", "entity", "a group of classes", 3))
    synsets = np.zeros((len(rows), 1), fields)
    for row, values in enumerate(rows):
        synsets[row, 0] = values
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / DEVKITS[0], "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"x")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        lines = "".join(f"{number}\n" for number in truth)
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_published(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / TRAIN, "w", format=tarfile.USTAR_FORMAT) as outer:
        for number, wnid in CLASSES.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for row in range(6):
                    add(tar, f"{wnid}_{row * 7}.JPEG", jpeg(number * 100 + row))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / VAL, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(len(TRUTH)):
            add(tar, f"ILSVRC2012_val_{row + 1:08}.JPEG", jpeg(row))
    write_devkit(folder, TRUTH)
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published")


@pytest.fixture
def unpacked(published: Path, tmp_path: Path) -> Path:
    """The usual folders."""
    root = tmp_path / "unpacked"
    with tarfile.open(published / TRAIN) as outer:
        for member in outer.getmembers():
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(root / "train" / member.name.removesuffix(".tar"), filter="data")
    with tarfile.open(published / VAL) as tar:
        tar.extractall(tmp_path / "flat", filter="data")
    for row, number in enumerate(TRUTH):
        (root / "val" / CLASSES[number]).mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{row + 1:08}.JPEG"
        shutil.move(tmp_path / "flat" / name, root / "val" / CLASSES[number] / name)
    return root


@pytest.mark.parametrize("name", ["", TRAIN])
def test_published_archives_are_the_data_of_the_usual_folders(
    published: Path, unpacked: Path, tmp_path: Path, name: str
) -> None:
    lines: list[str] = []
    folder = prepare_dataset(str(unpacked), tmp_path / "folder")
    info = prepare_dataset(str(published / name), tmp_path / "out", jobs=2, report=lines.append)
    assert info.digest == folder.digest
    assert info.samples == {"train": 18, "val": 6}
    assert info.schema.metadata["classes"] == sorted(CLASSES.values())
    assert lines[0] == f"train: 18 images from {TRAIN}; val: 6 images from {VAL}"
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]["summary"]
    assert summary["class_words"] == {CLASSES[number]: WORDS[number] for number in CLASSES}


def test_devkit_may_be_unpacked(published: Path, unpacked: Path, tmp_path: Path) -> None:
    with tarfile.open(published / DEVKITS[0]) as tar:
        tar.extractall(published, filter="data")
    (published / DEVKITS[0]).unlink()
    digests = {prepare_dataset(str(path), tmp_path / path.name[:2]).digest for path in (published, unpacked)}
    assert len(digests) == 1


def test_training_archive_alone_holds_out_a_part(published: Path, unpacked: Path, tmp_path: Path) -> None:
    (published / VAL).unlink()
    shutil.rmtree(unpacked / "val")
    lines: list[str] = []
    info = prepare_dataset(str(published), tmp_path / "out", report=lines.append)
    assert info.digest == prepare_dataset(str(unpacked), tmp_path / "folder").digest
    assert lines[0] == f"train: 14 images from {TRAIN}; val: 4 images, 20% of each class held out"


def test_validation_images_without_labels_are_refused(published: Path, tmp_path: Path) -> None:
    def fault() -> str:
        with pytest.raises(DataError) as found:
            prepare_dataset(str(published), tmp_path / "out")
        assert "\n" not in str(found.value)
        assert not (tmp_path / "out").exists()
        return str(found.value)

    write_devkit(published, TRUTH[:5])
    assert "ILSVRC2012_val_00000006.JPEG has no label among the 5" in fault()
    write_devkit(published, [*TRUTH, 1])
    assert "has 6 images, but ILSVRC2012_validation_ground_truth.txt has 7 labels" in fault()
    write_devkit(published, [*TRUTH[:5], 9])
    assert "is not that of ImageNet 2012: KeyError(9)" in fault()
    kit = (published / DEVKITS[0]).read_bytes()
    for damaged in (kit[:-8] + bytes(8), kit[:-100], kit[:3], b"", b"no archive", kit[:100] + bytes(200) + kit[300:]):
        (published / DEVKITS[0]).write_bytes(damaged)
        assert f"{DEVKITS[0]} is damaged: " in fault()
    (published / DEVKITS[0]).unlink()
    assert f"{VAL} has no labels; put {DEVKITS[0]}, which has them, into the same folder" in fault()


def test_damaged_tar_inside_the_tar_is_named(published: Path, tmp_path: Path) -> None:
    data = bytearray((published / TRAIN).read_bytes())
    with tarfile.open(published / TRAIN) as outer:
        member = outer.getmembers()[1]
    data[member.offset_data] ^= 1  # the first letter of the first name
    (published / TRAIN).write_bytes(data)
    with pytest.raises(DataError, match=rf"{TRAIN} is damaged: {member.name}: bad checksum \(header at byte 0\)"):
        prepare_dataset(str(published), tmp_path / "out")
    (published / TRAIN).write_bytes(data[: member.offset_data + 700])
    with pytest.raises(DataError, match=rf"{TRAIN} is damaged: it ends without the mark of its end"):
        prepare_dataset(str(published), tmp_path / "out")


def test_folder_with_images_only_is_no_imagenet(tmp_path: Path) -> None:
    assert prepare_dataset(str(write_tree(tmp_path / "tree", 5)), tmp_path / "out").samples == {"train": 12, "val": 3}
