"""Arrays that numpy saved, and CSV files: images with labels in files that are no folders of classes."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_trees import fault_of, read_pixels, write_tree
from PIL import Image

from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources import read_source
from bigincubate.errors import ConfigError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, count in (("train", 30), ("val", 5)):
        write_tree(tmp_path / "tree" / split, count)
    return tmp_path / "tree"


def arrays_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return pixels, np.array(["abc".index(file.parent.name) for file in files])


# ------------------------------------------------------------------------------------------------ npz


@pytest.mark.parametrize("names", ["x_{}", "{}_images"])
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_have_the_images_of_the_folder(tree: Path, tmp_path: Path, names: str, compressed: bool) -> None:
    labels = names.replace("x", "y").replace("images", "labels")
    (train, train_labels), (val, val_labels) = arrays_of(tree / "train"), arrays_of(tree / "val")
    arrays = {
        names.format("train"): train,
        labels.format("train"): train_labels,
        names.format("test"): val.transpose(0, 3, 1, 2),  # channels first
        labels.format("test"): val_labels[:, None].astype(np.uint8),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays)
    lines: list[str] = []
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    info = prepare_dataset(str(tmp_path / "x.npz"), tmp_path / "out", jobs=2, report=lines.append)
    assert info.samples == folder.samples
    assert info.schema.metadata["classes"] == ["0", "1", "2"]
    assert read_pixels(tmp_path / "out") == read_pixels(tmp_path / "folder")
    assert lines[0] == f"train: 90 images from {names.format('train')}; val: 15 images from {names.format('test')}"
    assert prepare_dataset(str(tmp_path / "x.npz"), tmp_path / "out") == info


def test_gray_arrays_of_other_names_with_names_of_classes(tmp_path: Path) -> None:
    pixels = np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8, 1)
    np.savez(tmp_path / "x.npz", photos=pixels, kinds=np.array(["dog", "cat"] * 20), more=np.zeros(3))
    columns = {"image": "photos", "label": "kinds"}
    assert read_source(str(tmp_path / "x.npz"), 0.2, columns).classes == ["cat", "dog"]
    message = fault_of(tmp_path / "x.npz", ConfigError, columns={"image": "photos"})
    assert "x.npz has the arrays photos, kinds, more; give image=NAME,label=NAME of them" in message
    assert "expected names such as x_train, y_train, or --columns image=NAME,label=NAME" in fault_of(tmp_path / "x.npz")
    message = fault_of(tmp_path / "x.npz", ConfigError, columns={**columns, "split": "part"})
    assert message.startswith("--columns split=…: only CSV files have such a column, not a .npz file")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (
            {"x": np.zeros((4, 8, 8), np.float32), "y": np.arange(4)},
            "x is float32 of the shape [4, 8, 8]; expected",
        ),
        ({"x": np.zeros((4, 8, 8, 4), np.uint8), "y": np.arange(4)}, "x is uint8 of the shape [4, 8, 8, 4]; expected"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.arange(5)}, "labels of x are int64 of the shape [5]; expected 4"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4)}, "the labels of x are float64"),
        ({"x": np.zeros((4, 8, 8), np.uint8)}, "has no pair of images and labels for train, but x; choose two arrays"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([1, "a"], object)}, "has an array of Python objects"),
        ({"x": np.zeros((4, 0, 8), np.uint8), "y": np.arange(4) % 2}, "x has the shape [4, 0, 8], so its images have"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert says in fault_of(tmp_path / "x.npz")


def test_truncated_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 2)
    data = (tmp_path / "x.npz").read_bytes()
    for damaged in (data[:-300], data[:1000] + b"\1" + data[1001:], b"", b"no array"):
        (tmp_path / "x.npz").write_bytes(damaged)
        assert "x.npz is damaged: " in fault_of(tmp_path / "x.npz")


# ------------------------------------------------------------------------------------------------ CSV


def write_csv(file: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]], **options: Any) -> Path:
    with file.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as text:
        writer = csv.writer(text, **options)
        writer.writerow(header)
        writer.writerows(rows)
    return file


def rows_of(tree: Path) -> list[tuple[str, str, str]]:
    files = sorted(tree.rglob("*.png"))
    return [(str(file.relative_to(tree.parent)), file.parent.name, file.parent.parent.name) for file in files]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_has_the_images_of_the_folder(tree: Path, tmp_path: Path, encoding: str) -> None:
    file = write_csv(tmp_path / "list.csv", ("path", "label", "split"), rows_of(tree), encoding=encoding)
    lines: list[str] = []
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    info = prepare_dataset(str(file), tmp_path / "out", jobs=2, report=lines.append)
    assert (info.samples, info.schema) == (folder.samples, folder.schema)
    assert read_pixels(tmp_path / "out") == read_pixels(tmp_path / "folder")
    assert lines[0] == "train: 90 images from list.csv; val: 15 images from list.csv"


def test_csv_without_splits_and_with_other_columns_and_absolute_paths(tree: Path, tmp_path: Path) -> None:
    rows = [(ord(name) - 87, "x,y", str(tmp_path / path)) for path, name, split in rows_of(tree) if split == "train"]
    file = write_csv(tmp_path / "list.tsv", ("species", "note", "photo"), rows, delimiter="\t")
    source = read_source(str(file), 0.2, {"image": "photo", "label": "species"})
    assert (source.classes, len(source.splits["train"])) == (["10", "11", "12"], 72)
    message = fault_of(file, ConfigError, columns={"image": "photo", "label": "kind"})
    assert "--columns label=kind: no such column in list.tsv: it has species, note, photo" in message
    assert "has no column for the image: its first line is species, note, photo" in fault_of(file)


def test_missing_files_of_a_csv_are_listed_and_pipes_are_skipped(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    rows = [*rows_of(tree), ("gone.png", "a", "train"), ("pipe.png", "a", "train"), ("tree", "a", "val")]
    file = write_csv(tmp_path / "list.csv", ("path", "label", "split"), rows)
    assert f"1 image cannot be read: {tmp_path}/gone.png: No such file or directory" in fault_of(file)
    assert read_source(str(file), 0.2).notes["skipped"] == {"folders, pipes, sockets and devices": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column for the image: its first line is nothing"),
        ("path,label\n", "lists no images for training"),
        ("path,label\na.png\n", "row 2: 1 value, but the header has 2"),
        ("path,label\n,a\n", "row 2: no path"),
        ("path,label,split\na.png,a,later\n", "row 2: the split 'later' is not train, val or test"),
        ("path,label,split\na.png,a,val\n", "lists no images for training"),
        ("path,label,class\na.png,a,b\n", "has several columns for the label"),
        ("path;label;split\na.png;a;train\n", "is path;label;split; separate columns with commas, not semicolons"),
        ("path,label\na.png,a\na.png,b\n", "'a.png' occurs twice"),
        ("path,label\na.png,a\nb.png,a\n", "has only one class, 'a'"),
        ("path,label\na.png,a\nb.png,\n", "has only one class, 'a'"),
        ('path,label\n"a.png,a\n', "is not a CSV file in UTF-8"),
        ("path,label\n\udcff.png,a\n", "is not a CSV file in UTF-8"),
    ],
)
def test_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "list.csv").write_text(text, errors="surrogateescape")
    assert says in fault_of(tmp_path / "list.csv")
