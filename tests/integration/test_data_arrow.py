"""Arrow files as `save_to_disk` of the library `datasets` writes them, written by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from image_trees import fault_of, read_pixels
from test_data_parquet import CLASSES, features, pyarrow, rows_of, tree

from bigincubate.data import prepare as preparing
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.samples import Sample
from bigincubate.data.sources import read_source
from bigincubate.data.sources.parquet import TableImage
from bigincubate.errors import ConfigError

__all__ = ["tree"]
ROWS = 7  # of a record batch


def batches(table: Any) -> Iterator[Any]:
    return iter(table.to_batches(max_chunksize=ROWS))


def write_arrow(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    kind: str = "stream",
    compression: str | None = None,
    metadata: dict[bytes, bytes] | None = None,
) -> Path:
    arrow = pyarrow()
    file.parent.mkdir(parents=True, exist_ok=True)
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(images)]
    table = arrow.table({"image": arrow.array(rows, image), "label": arrow.array(labels)})
    table = table.replace_schema_metadata(metadata)
    options = arrow.ipc.IpcWriteOptions(compression=compression)
    new = arrow.ipc.new_stream if kind == "stream" else arrow.ipc.new_file
    with new(str(file), table.schema, options=options) as writer:
        for batch in batches(table):
            writer.write_batch(batch)
    return file


@pytest.fixture
def saved(tree: Path, tmp_path: Path) -> Path:
    """A `DatasetDict` that was saved, next to the result of a function that the library has stored."""
    folder, (images, labels) = tmp_path / "saved", rows_of(tree / "train")
    for number, part in enumerate((slice(None, 45), slice(45, None))):
        name = f"data-{number:05}-of-00002.arrow"
        write_arrow(folder / "train" / name, images[part], labels[part], metadata=features())
    write_arrow(folder / "train" / "cache-1f.arrow", images[:3], labels[:3], metadata=features())
    state = {"_data_files": [{"filename": f"data-{number:05}-of-00002.arrow"} for number in range(2)]}
    (folder / "train" / "state.json").write_text(json.dumps(state))
    write_arrow(folder / "test" / "data-00000-of-00001.arrow", *rows_of(tree / "val"), metadata=features())
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def test_saved_data_has_the_images_and_classes_of_the_folder(
    saved: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 16)
    lines: list[str] = []
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    info = prepare_dataset(str(saved), tmp_path / "out", report=lines.append)
    assert (info.samples, info.schema) == (folder.samples, folder.schema)
    assert read_pixels(tmp_path / "out") == read_pixels(tmp_path / "folder")
    assert lines[0] == "train: 90 images from 2 files; val: 15 images from test/data-00000-of-00001.arrow"
    assert prepare_dataset(str(saved), tmp_path / "three", jobs=3).digest == info.digest
    assert prepare_dataset(str(saved), tmp_path / "out") == info


def read_image(sample: Sample) -> bytes:
    assert isinstance(sample.image, TableImage)
    return sample.image.read()


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "lz4"])
def test_streams_and_files_with_and_without_compression_are_read(
    tree: Path, tmp_path: Path, kind: str, compression: str | None
) -> None:
    images, labels = rows_of(tree / "train")
    file = tmp_path / "train.arrow"
    write_arrow(file, images, [CLASSES[label] for label in labels], kind=kind, compression=compression)
    source = read_source(str(file), 0.2)
    assert source.classes == CLASSES
    samples = [sample for split in source.splits.values() for sample in split]
    assert sorted(read_image(sample) for sample in samples) == sorted(images)
    message = fault_of(file, ConfigError, columns={"label": "species"})
    assert "--columns label=species: no such column of labels in train.arrow" in message


def test_damaged_file_is_named(tree: Path, tmp_path: Path) -> None:
    file = write_arrow(tmp_path / "x.arrow", *rows_of(tree / "train"))
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"x", b"\0" * 100, data[:-8]):
        file.write_bytes(damaged)
        assert f"{file} is damaged: " in fault_of(file)


def test_positions_outside_of_a_file_are_not_read(tree: Path, tmp_path: Path) -> None:
    """Arrow files are not decoded, so a damaged position would read memory of the process."""
    images, labels = rows_of(tree / "train")
    file = write_arrow(tmp_path / "x.arrow", images[:ROWS], labels[:ROWS])
    data = bytearray(file.read_bytes())
    ends = b"".join(sum(map(len, images[:count])).to_bytes(4, "little") for count in range(ROWS + 1))
    begin = data.index(ends)
    data[begin + 4 : begin + 8] = (2**30).to_bytes(4, "little")
    file.write_bytes(data)
    assert "7 images cannot be read" in fault_of(file)
    assert "the file is damaged here: " in (tmp_path / "fault" / "unreadable-files.txt").read_text()


def test_rows_without_an_image_are_listed(tree: Path, tmp_path: Path) -> None:
    images, labels = rows_of(tree / "train")
    file = write_arrow(tmp_path / "x.arrow", [*images[:-1], None], labels)
    message = f"{file} (record batch 12, row 5): there is no image in this row, but at most a path"
    assert f"1 image cannot be read: {message}" in fault_of(file)


def test_incomplete_copy_is_refused(saved: Path) -> None:
    (saved / "train" / "data-00001-of-00002.arrow").unlink()
    message = fault_of(saved)
    assert message.startswith(f"{saved / 'train' / 'state.json'} lists 'data-00001-of-00002.arrow', which is not here")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_columns_with_dots_in_their_names_are_read(tree: Path, tmp_path: Path, suffix: str) -> None:
    """As `flatten` of the library `datasets` names them."""
    arrow = pyarrow()
    import pyarrow.parquet as parquet

    images, labels = rows_of(tree / "train")
    table = arrow.table({"image.bytes": images, "image.path": ["x.png"] * len(images), "label": labels})
    file = tmp_path / f"flat.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, file, row_group_size=ROWS)
    else:
        with arrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS)
    source = read_source(str(file), 0.2, {"image": "image.bytes", "label": "label"})
    samples = [sample for split in source.splits.values() for sample in split]
    assert sorted(read_image(sample) for sample in samples) == sorted(images)


def test_columns_of_the_same_name_are_refused(tree: Path, tmp_path: Path) -> None:
    arrow = pyarrow()
    images, labels = rows_of(tree / "train")
    table = arrow.table([images, labels, labels], names=["image", "label", "label"])
    with arrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert "has several columns 'label'; write it again with different names" in fault_of(tmp_path / "x.arrow")
