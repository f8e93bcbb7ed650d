"""Which files of a folder are images, of which class and split; what is skipped, and what is refused."""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from denied import deny
from PIL import Image

from bigincubate.data.samples import Source
from bigincubate.data.sources import read_source
from bigincubate.errors import DataError, SystemResourceError


def encoded(form: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(out, form)
    return out.getvalue()


PNG = encoded("PNG")


def write_files(root: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_classes(root: Path, *classes: str, count: int = 10) -> Path:
    return write_files(root, *(f"{name}/{row}.png" for name in classes for row in range(count)))


def counts(source: Source, split: str) -> dict[str, int]:
    found = Counter(source.classes[sample.label] for sample in source.splits[split])
    return {name: found[name] for name in source.classes}


def fault_of(root: Path) -> str:
    with pytest.raises(DataError) as fault:
        read_source(str(root), 0.2)
    assert "\n" not in str(fault.value)
    return str(fault.value)


# ------------------------------------------------------------------------------------------------ links


def test_links_in_circles_and_to_other_classes_count_no_image_twice(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", "a", "b")
    (root / "a" / "again").symlink_to(".")
    (root / "a" / "above").symlink_to("..")
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "first.png").symlink_to("0.png")
    os.link(root / "b" / "0.png", root / "b" / "hard.png")
    source = read_source(str(root), 0.2)
    assert (counts(source, "train"), counts(source, "val")) == ({"a": 8, "b": 8}, {"a": 2, "b": 2})
    assert source.notes["skipped"]["links to what is counted already"] == 6  # "above" leads to a and b again
    files = [os.path.realpath(str(sample.image)) for samples in source.splits.values() for sample in samples]
    assert len(files) == len(set(files)) == 20


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    write_classes(tmp_path / "store", "cats", "dogs")
    (tmp_path / "images").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "store" / name)
    assert counts(read_source(str(tmp_path / "images"), 0.2), "train") == {"cats": 8, "dogs": 8}


def test_validation_that_is_a_link_to_training_is_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "train", "a", "b").parent
    (root / "val").symlink_to("train")
    assert f"no images in {root}/val: what it leads to is counted as {root}/train/a" in fault_of(root)


def test_class_that_is_a_link_to_another_class_is_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", "a", "b")
    (root / "c").symlink_to("a")
    assert f"no images in {root}/c: what it leads to is counted as {root}/a already" in fault_of(root)


# ------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("train", "val"), "val"),
        (("train", "valid"), "valid"),
        (("Training", "VALIDATION"), "VALIDATION"),
        (("train", "test"), "test"),
        (("TRAIN", "Val", "test"), "Val"),
    ],
)
def test_names_of_splits_have_no_case(tmp_path: Path, names: tuple[str, ...], used: str) -> None:
    for number, name in enumerate(names):
        write_classes(tmp_path / name, "a", "b", count=number + 1)
    source = read_source(str(tmp_path), 0.2)
    assert source.classes == ["a", "b"]
    assert source.notes["folders"] == {"train": names[0], "val": used}
    assert source.notes["unused"] == list(names[2:])
    assert [len(source.splits[split]) for split in ("train", "val")] == [2, 4]


def test_training_folder_alone_is_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", "a", "b")
    write_files(tmp_path, "annotations/list.txt", data=b"x")
    source = read_source(str(tmp_path), 0.2)
    assert counts(source, "val") == {"a": 2, "b": 2}
    assert source.notes["unused"] == ["annotations"]


@pytest.mark.parametrize("name", ["train", "Train"])
def test_class_may_be_called_train(tmp_path: Path, name: str) -> None:
    assert read_source(str(write_classes(tmp_path, "bus", name)), 0.2).classes == sorted(["bus", name])


LAYOUTS: dict[str, tuple[list[str], str]] = {
    "train beside a class": (["train/a/1.png", "train/b/1.png", "car/1.png"], "has car/ next to train/"),
    "two names for validation": (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "has val/ and valid/; keep one"),
    "validation only": (["valid/a/1.png", "valid/b/1.png"], "has valid/ but no train/"),
    "test beside classes": (["a/1.png", "b/1.png", "test/1.png"], "has test/ but no train/"),
    "one level too high": (
        ["hym/data/train/a/1.png", "hym/data/val/a/1.png"],
        "/hym/data has train/, val/, so data is",
    ),
    "two sets": (["one/train/a/1.png", "two/train/a/1.png"], "/one has train/, so one is no class; prepare /"),
    "one class around the classes": (["all/a/1.png", "all/b/1.png"], "if a, b are the classes, prepare /"),
    "one class only": (["all/1.png"], "has only one class, all, but training needs at least two; add the others"),
    "no classes": (["1.png", "2.png"], "found 2 images without a folder of a class"),
    "no classes but a table": (
        ["1.png", "labels.csv"],
        "1 image without a folder of a class and labels.csv; prepare",
    ),
    "no classes but a list": (
        ["1.png", "labels.txt"],
        "1 image without a folder of a class and labels.txt, but",
    ),
    "archive in a folder": (["images.zip"], "found 1 .zip file; .zip files in such a folder are not read: prepare the"),
    "no classes in train": (["train/1.png", "val/1.png"], "/train has no folders of classes: found 1 image without"),
    "no classes in val": (["train/a/1.png", "train/b/1.png", "val/1.png"], "/val: found 1 image without a folder"),
    "class only in val": (["train/a/1.png", "train/b/1.png", "val/c/1.png"], "/val/c: this class has no training"),
    "records": (
        ["data/1.tfrecord", "README.md"],
        "found 1 .tfrecord file, 1 .md file; .tfrecord files are not read yet",
    ),
    "records in train": (
        ["train/1.tfrecord", "test/1.tfrecord"],
        ".tfrecord files are not read yet: write their images",
    ),
    "avif": (["a/1.avif", "b/1.avif"], "found 2 .avif files; .avif files are not read yet: convert them to PNG"),
    "class without images": (["a/1.png", "b/2.txt"], "/b: found 1 .txt file; add images or remove the folder"),
    "nothing": ([], "found no files at all"),
    "prepared data": (["dataset.json", "train/index.json"], "is prepared data already; use it with --set data.path=/"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_unknown_layout_is_refused_with_what_was_found(tmp_path: Path, name: str) -> None:
    names, says = LAYOUTS[name]
    if name == "one level too high":
        names, tmp_path = [file.removeprefix("hym/") for file in names], tmp_path / "hym"
    tmp_path.mkdir(exist_ok=True)
    write_files(tmp_path, *(file for file in names if file.endswith(".png")))
    message = fault_of(write_files(tmp_path, *(file for file in names if not file.endswith(".png")), data=b"text"))
    assert says in message
    assert str(tmp_path) in message


def test_deeper_folder_that_a_message_names_can_be_prepared(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_classes(tmp_path / "a b" / "set" / split, "x", "y")
    message = fault_of(tmp_path / "a b")
    assert message.endswith(f"prepare '{tmp_path}/a b/set'")
    assert read_source(message.rpartition("prepare ")[2].strip("'"), 0.2).classes == ["x", "y"]


# ------------------------------------------------------------------------------------------------ class sizes


def test_each_class_keeps_a_training_image_and_validates_if_it_can(tmp_path: Path) -> None:
    write_classes(tmp_path, "many", count=30)
    write_classes(tmp_path, "two", "pair", count=2)
    write_classes(tmp_path, "one", "single", count=1)
    source = read_source(str(tmp_path), 0.2)
    assert counts(source, "train") == {"many": 23, "one": 1, "pair": 1, "single": 1, "two": 1}
    assert counts(source, "val") == {"many": 7, "one": 0, "pair": 1, "single": 0, "two": 1}


@pytest.mark.parametrize(("count", "fraction", "says"), [(1, 0.2, "only one image"), (5, 0.0, "nothing is held out")])
def test_split_without_validation_images_is_refused(tmp_path: Path, count: int, fraction: float, says: str) -> None:
    write_classes(tmp_path, *"0123456789", count=count)
    with pytest.raises(DataError, match=says):
        read_source(str(tmp_path), fraction)


# ------------------------------------------------------------------------------------------------ which files


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", ["x.jfif", "x", "x.image"])
def test_image_of_unknown_suffix_is_known_by_its_content(tmp_path: Path, form: str, name: str) -> None:
    write_classes(tmp_path, "a", "b", count=2)
    write_files(tmp_path / "a", name, data=encoded(form))
    assert (
        counts(read_source(str(tmp_path), 0.5), "train")["a"] + counts(read_source(str(tmp_path), 0.5), "val")["a"] == 3
    )


def test_file_of_unknown_suffix_that_is_unreadable_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, "a", "b", count=2)
    write_files(tmp_path / "a", "x")
    deny(monkeypatch, tmp_path / "a" / "x")
    source = read_source(str(tmp_path), 0.5)
    (sample,) = [each for split in source.splits.values() for each in split if each.name == "a/x"]
    with pytest.raises(PermissionError):
        sample.read()
    assert source.notes["skipped"] == {}


def test_unreadable_file_outside_of_the_class_folders_is_not_called_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, "a", "b", count=2)
    write_files(tmp_path, "LICENSE", "notes.txt", data=b"text")
    for name in ("LICENSE", "notes.txt"):
        deny(monkeypatch, tmp_path / name)
    assert read_source(str(tmp_path), 0.5).notes["skipped"] == {".txt": 1, "files that cannot be read": 1}


def test_file_whose_folder_denies_access_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may be listed, but not searched."""
    write_classes(tmp_path, "a", "b", count=2)
    write_files(tmp_path / "a" / "deep", "x", "notes.txt")
    stat = os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and Path(path).parent == tmp_path / "a" / "deep":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    source = read_source(str(tmp_path), 0.5)
    assert len([each for split in source.splits.values() for each in split if each.name.startswith("a/")]) == 3
    assert source.notes["skipped"] == {".txt": 1}


def test_folder_with_a_file_that_may_be_an_image_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        write_classes(tmp_path / split, "a", "b", count=2)
    write_files(tmp_path / "other", "x")
    deny(monkeypatch, tmp_path / "other" / "x")
    with pytest.raises(SystemResourceError, match=r"other/x: Permission denied; change its permissions, then run"):
        read_source(str(tmp_path), 0.5)


def test_skipped_files_are_counted_by_reason_at_every_level(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_classes(tmp_path / split, "a", "b", count=2)
    write_files(tmp_path, ".git/x.png", "train/.ipynb_checkpoints/x.png", "train/a/.ipynb_checkpoints/x.png")
    write_files(tmp_path, "train/a/@eaDir/x.png", "val/b/deep/Thumbnails/x.png", "val/b/deep/__MACOSX/x/y.png")
    write_files(tmp_path, "train/stray.png", "train/a/._0.png")
    write_files(tmp_path, "train/a/notes.txt", "train/a/more.TXT", "README", "val/b/x.avif", data=b"text")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    source = read_source(str(tmp_path), 0.2)
    assert [len(source.splits[split]) for split in ("train", "val")] == [4, 4]
    assert source.notes["skipped"] == {
        ".avif (not read: convert them to PNG or JPEG)": 1,
        ".txt": 2,
        "hidden files": 1,
        "images outside of the class folders": 1,
        "in folders .git": 1,
        "in folders .ipynb_checkpoints": 2,
        "in folders @eaDir": 1,
        "in folders Thumbnails": 1,
        "in folders __MACOSX": 1,
        "pipes, sockets and devices": 1,
        "suffixless": 1,
    }


def test_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    root = write_classes(tmp_path, "a", "b")
    os.rename(root / "a" / "0.png", os.fsdecode(os.path.join(os.fsencode(root), b"a", b"\xff.png")))
    assert counts(read_source(str(root), 0.2), "train") == {"a": 8, "b": 8}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("images.7z", ".7z files are not read yet: unpack them"),
        ("train.tfrecord", ".tfrecord files are not read yet"),
        ("notes.txt", "unknown kind of source"),
        ("images.zip", "is damaged: it does not begin as a .zip file"),
    ],
)
def test_file_that_is_no_source_is_named(tmp_path: Path, name: str, says: Any) -> None:
    message = fault_of(write_files(tmp_path, name, data=b"x") / name)
    assert says in message
    assert message.startswith(str(tmp_path / name))
