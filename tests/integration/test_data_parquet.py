"""Parquet files as the Hugging Face Hub has them, written by pyarrow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_trees import fault_of, read_pixels, write_tree
from image_trees import read_contents as contents

from bigincubate.data import prepare as preparing
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources import parquet as reading
from bigincubate.data.sources import read_source
from bigincubate.errors import ConfigError, Exit, MissingDependencyError

CLASSES = ["a", "b", "c"]


def pyarrow() -> Any:
    return pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'bigincubate[parquet]'")


def features(names: list[str] = CLASSES, label: str = "label") -> dict[bytes, bytes]:
    """Return the metadata that the library `datasets` writes."""
    kinds = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


def write_parquet(
    file: Path,
    images: list[Any],
    labels: list[Any],
    *,
    metadata: dict[bytes, bytes] | None = None,
    columns: tuple[str, str] = ("image", "label"),
    struct: bool = True,
    group: int = 7,
    **more: Any,
) -> Path:
    arrow = pyarrow()
    import pyarrow.parquet as parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]) if struct else arrow.binary()
    rows = [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)] if struct else images
    made = {columns[0]: arrow.array(rows, kind), columns[1]: arrow.array(labels)}
    made |= {name: arrow.array(values) for name, values in more.items()}
    parquet.write_table(arrow.table(made).replace_schema_metadata(metadata), file, row_group_size=group)
    return file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, count in (("train", 30), ("val", 5)):
        write_tree(tmp_path / "tree" / split, count)
        for file in (tmp_path / "tree" / split).rglob("*.png"):
            if split == "val":
                os.rename(file, file.with_name(f"v{file.name}"))
    return tmp_path / "tree"


def rows_of(folder: Path) -> tuple[list[bytes], list[int]]:
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    return [file.read_bytes() for file in files], [CLASSES.index(file.parent.name) for file in files]


@pytest.fixture
def hub(tree: Path, tmp_path: Path) -> Path:
    """Two files for training and one for validation, in row groups, with names of classes."""
    images, labels = rows_of(tree / "train")
    half = len(images) // 2
    folder = tmp_path / "hub"
    for number, part in enumerate((slice(None, half), slice(half, None))):
        file = folder / "data" / f"train-{number:05}-of-00002.parquet"
        write_parquet(file, images[part], labels[part], metadata=features())
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", *rows_of(tree / "val"), metadata=features())
    (folder / "README.md").write_text("a card")
    return folder


# ------------------------------------------------------------------------------------------------ what is read


def test_hub_folder_has_the_images_and_classes_of_the_folder(hub: Path, tree: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    info = prepare_dataset(str(hub), tmp_path / "out", report=lines.append)
    assert info.samples == folder.samples == {"train": 90, "val": 15}
    assert info.schema == folder.schema
    assert read_pixels(tmp_path / "out") == read_pixels(tmp_path / "folder")
    assert lines[0] == "train: 90 images from 2 files; val: 15 images from data/validation-00000-of-00001.parquet"
    assert prepare_dataset(str(hub), tmp_path / "out") == info


@pytest.mark.parametrize("jobs", [1, 3])
def test_row_groups_are_read_once_per_chunk_and_never_back(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 16)
    opened: list[tuple[str, int]] = []
    read = reading._GroupReader._read_batches

    def count(self: Any) -> Any:
        opened.append((self._place[0], self._place[3]))
        return read(self)

    monkeypatch.setattr(reading._GroupReader, "_read_batches", count)
    info = prepare_dataset(str(hub), tmp_path / f"out-{jobs}", jobs=jobs)
    if jobs == 1:
        assert len(opened) == len(set(opened)) == 7 + 7 + 3  # row groups of 45, 45 and 15 rows
    monkeypatch.setattr(preparing, "MAX_BLOCK_CHUNKS", 0)  # row groups that are too large for a chunk
    large = prepare_dataset(str(hub), tmp_path / f"large-{jobs}", jobs=jobs)
    assert read_pixels(tmp_path / f"large-{jobs}") == read_pixels(tmp_path / f"out-{jobs}")
    assert (info.digest == large.digest) is False


def test_processes_do_not_change_a_bit_and_preparation_resumes(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 16)
    one = prepare_dataset(str(hub), tmp_path / "one")
    assert prepare_dataset(str(hub), tmp_path / "three", jobs=3).digest == one.digest
    assert contents(tmp_path / "one") == contents(tmp_path / "three")

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 40:
            raise Stop

    with pytest.raises(Stop):
        prepare_dataset(str(hub), tmp_path / "again", on_progress=stop)
    seen: list[int] = []
    again = prepare_dataset(str(hub), tmp_path / "again", on_progress=lambda done, _: seen.append(done))
    assert again.digest == one.digest
    assert seen[0] > 20


def test_columns_of_other_names_are_named_by_the_user(tree: Path, tmp_path: Path) -> None:
    images, labels = rows_of(tree / "train")
    text = [CLASSES[label] for label in labels]
    file = write_parquet(
        *(tmp_path / "x.parquet", images, labels), columns=("photo", "coarse"), struct=False, fine=text, note=text
    )
    columns = {"image": "photo", "label": "fine"}
    info = prepare_dataset(str(file), tmp_path / "out", columns=columns)
    assert (info.schema.metadata["classes"], sum(info.samples.values())) == (CLASSES, 90)
    assert "coarse, fine, note may be the column of the label; choose one with --columns label=NAME" in fault_of(file)
    message = fault_of(file, ConfigError, columns={"image": "photo", "label": "color"})
    assert (
        "--columns label=color: no such column of labels in x.parquet: it has photo (binary), coarse (int64)" in message
    )
    assert "image=fine: no such column of images" in fault_of(
        file, ConfigError, columns={"image": "fine", "label": "fine"}
    )


def test_numbers_without_names_become_classes_in_their_order(tree: Path, tmp_path: Path) -> None:
    images, labels = rows_of(tree / "train")
    file = write_parquet(tmp_path / "x.parquet", images, [label * 5 + 5 for label in labels], columns=("img", "y"))
    assert read_source(str(file), 0.2).classes == ["5", "10", "15"]


def test_rows_without_labels_and_classes_without_rows_are_reported(tree: Path, tmp_path: Path) -> None:
    images, labels = rows_of(tree / "train")
    given = [None, -1, *labels[2:]]
    names = ["a", "none", "b", "c"]
    given = [label + (label > 0) if label is not None and label >= 0 else label for label in given]
    write_parquet(tmp_path / "hub" / "train-0.parquet", images, given, metadata=features(names))
    write_parquet(tmp_path / "hub" / "test-0.parquet", images[:3], [-1] * 3, metadata=features(names))
    lines: list[str] = []
    info = prepare_dataset(str(tmp_path / "hub"), tmp_path / "out", report=lines.append)
    assert info.schema.metadata["classes"] == CLASSES
    assert sum(info.samples.values()) == 88
    assert lines[0].endswith("20% of each class held out")
    assert "classes without training images, left out: none" in lines
    assert "skipped files: rows without a label: 5" in lines


# ------------------------------------------------------------------------------------------------ what is refused


def test_rows_without_an_image_are_listed(tree: Path, tmp_path: Path) -> None:
    images, labels = rows_of(tree / "train")
    file = write_parquet(tmp_path / "x.parquet", [*images[:-2], None, b"no image"], labels)
    assert "2 of 90 images cannot be read" in fault_of(file)
    listed = (tmp_path / "fault" / "unreadable-files.txt").read_text()
    assert f"{file} (row group 12, row 4): there is no image in this row, but at most a path" in listed
    assert f"{file} (row group 12, row 5): not an image of the formats" in listed


def test_damaged_file_is_named(hub: Path, tmp_path: Path) -> None:
    file = hub / "data" / "train-00001-of-00002.parquet"
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:-8] + b"\xff" * 8):
        file.write_bytes(damaged)
        assert f"{file} is damaged: " in fault_of(hub)
    file.write_bytes(data[:200] + bytes(3000) + data[3200:])
    assert "cannot be read" in fault_of(hub) or "is damaged" in fault_of(hub)


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        ([0, 1, 2, 3], CLASSES, "the label 3 of 'x.parquet/3' is not among the 3 classes"),
        ([0, 0, 0, 0], CLASSES, "has only one class, 'a'"),
        ([None, None, None, -1], CLASSES, "has no training images with a label"),
        ([0.5, 1.0, 1.5, 2.0], None, "has no column of integers or names of classes: it has image (struct<"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tree: Path, tmp_path: Path, labels: Any, names: Any, says: str) -> None:
    metadata = features(names) if names else None
    assert says in fault_of(write_parquet(tmp_path / "x.parquet", rows_of(tree)[0][:4], labels, metadata=metadata))


def test_files_of_unknown_splits_and_other_classes_are_refused(hub: Path, tree: Path) -> None:
    other = write_parquet(hub / "data" / "more.parquet", *rows_of(tree / "val"), metadata=features())
    assert f"{other}: the names of other files say train, val or test, but not this one" in fault_of(hub)
    other.unlink()
    write_parquet(hub / "data" / "train-2.parquet", *rows_of(tree / "val"), metadata=features(["a", "b", "d"]))
    assert "train-2.parquet has other names of classes than the files before it" in fault_of(hub)


def test_missing_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = fault_of(tmp_path / "x.parquet", MissingDependencyError)
    assert message.endswith("reading .parquet files needs pyarrow; install it with: pip install 'bigincubate[parquet]'")
    assert MissingDependencyError.code == Exit.ENVIRONMENT


def test_columns_on_the_command_line(tree: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    words = ("data", "prepare", tree, "--out", tmp_path / "out", "--columns")
    for given, says in (
        ("image", "--columns image: expected image=NAME,label=NAME"),
        ("image=a,image=b", "expected image=NAME,label=NAME"),
        ("picture=a", "--columns picture=…: expected image=NAME"),
        ("image=a", "is a folder of images by class, which has no columns"),
    ):
        code, _, err = call(*words, given)
        assert (code, says in err, err.count("\n")) == (Exit.USAGE, True, 1)
    assert not (tmp_path / "out").exists()
    file = write_parquet(tmp_path / "x.parquet", *rows_of(tree / "train"), columns=("i", "l"), other=[1] * 90)
    code, out, err = call("data", "prepare", file, "--out", tmp_path / "out", "--columns", "image=i,label=l")
    assert (code, err) == (0, "")
    assert "train: 72 images from x.parquet; val: 18 images, 20% of each class held out" in out
