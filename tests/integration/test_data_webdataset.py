"""WebDataset shards, written by the library `webdataset` where it is installed, and by `tarfile` in its layout."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from image_trees import fault_of, read_pixels, write_tree
from image_trees import read_contents as contents

from bigincubate.data import prepare as preparing
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources import read_source
from bigincubate.data.sources.webdataset import expand_braces
from bigincubate.errors import ConfigError, DataError

Sample = dict[str, Any]  # as webdataset names it: extension -> value, and __key__


def write_with_tarfile(file: Path, samples: list[Sample]) -> None:
    with tarfile.open(file, "w") as tar:
        for sample in samples:
            for extension, value in sample.items():
                if extension == "__key__":
                    continue
                data = value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else b""
                data = data or (json.dumps(value) if extension.endswith("json") else str(value)).encode()
                member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_with_webdataset(file: Path, samples: list[Sample]) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset (pip install webdataset)")
    with webdataset.TarWriter(str(file)) as sink:
        for sample in samples:
            sink.write(sample)


WRITERS = [
    write_with_tarfile,
    pytest.param(
        write_with_webdataset,
        marks=pytest.mark.skipif(
            importlib.util.find_spec("webdataset") is None, reason="needs webdataset (pip install webdataset)"
        ),
    ),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, count in (("train", 30), ("val", 5)):
        write_tree(tmp_path / "tree" / split, count)
    return tmp_path / "tree"


def samples_of(folder: Path, label: str = "cls") -> list[Sample]:
    files = sorted(folder.rglob("*.png"), key=lambda file: (file.name, file.parent.name))
    labels: dict[str, Any] = {
        "cls": lambda name: "abc".index(name),
        "txt": str,
        "json": lambda name: {"label": name, "x": [1]},
    }
    return [
        {"__key__": f"{row:06}", "png": file.read_bytes(), label: labels[label](file.parent.name)}
        for row, file in enumerate(files)
    ]


def write_shards(tree: Path, folder: Path, write: Any = write_with_tarfile, label: str = "cls") -> Path:
    folder.mkdir()
    train = samples_of(tree / "train", label)
    for number in range(3):
        write(folder / f"my-train-{number:04}.tar", train[number * 30 : number * 30 + 30])
    write(folder / "my-val-0000.tar", samples_of(tree / "val", label))
    return folder


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_shards_have_the_images_of_the_folder(tree: Path, tmp_path: Path, write: Any, label: str) -> None:
    shards = write_shards(tree, tmp_path / "shards", write, label)
    folder = prepare_dataset(str(tree), tmp_path / "folder")
    lines: list[str] = []
    info = prepare_dataset(str(shards), tmp_path / "out", report=lines.append)
    assert info.samples == folder.samples
    assert info.schema.metadata["classes"] == (["0", "1", "2"] if label == "cls" else ["a", "b", "c"])
    assert read_pixels(tmp_path / "out") == read_pixels(tmp_path / "folder")
    assert lines[0] == "train: 90 images from 3 shards; val: 15 images from my-val-0000.tar"
    pattern = prepare_dataset(str(shards / "my-{train-{0000..0002},val-0000}.tar"), tmp_path / "pattern")
    assert pattern.digest == info.digest
    assert prepare_dataset(str(shards), tmp_path / "out") == info


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_of_classes_come_from_a_file(tree: Path, tmp_path: Path, encoding: str) -> None:
    shards = write_shards(tree, tmp_path / "shards")
    (shards / "classnames.txt").write_text("ant\nbee\ncat\n", encoding)
    assert read_source(str(shards), 0.2).classes == ["ant", "bee", "cat"]


def test_label_that_is_not_in_the_file_of_classes_is_named(tree: Path, tmp_path: Path) -> None:
    shards = write_shards(tree, tmp_path / "shards", label="txt")
    (shards / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"the label 'c' of .* is not among the 2 classes"):
        read_source(str(shards), 0.2)


def test_result_does_not_depend_on_the_number_of_processes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 16)
    shards = write_shards(tree, tmp_path / "shards")
    digests = {prepare_dataset(str(shards), tmp_path / f"{jobs}", jobs=jobs).digest for jobs in (1, 3)}
    assert len(digests) == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_single_shard_holds_out_a_part_and_other_extensions_are_given(tree: Path, tmp_path: Path) -> None:
    samples = [
        {"__key__": f"dir/{row}", "left.png": sample["png"], "right.png": b"x", "meta.json": {"kind": sample["txt"]}}
        for row, sample in enumerate(samples_of(tree / "train", "txt"))
    ]
    write_with_tarfile(tmp_path / "x.tar", samples)
    columns = {"image": "left.png", "label": "meta.json.kind"}
    source = read_source(str(tmp_path / "x.tar"), 0.2, columns)
    assert (source.classes, [len(rows) for rows in source.splits.values()]) == (["a", "b", "c"], [72, 18])
    assert source.splits["train"][0].name.startswith("x.tar/dir/")


@pytest.mark.parametrize("given", [{"image": "jpg"}, {"image": "png", "label": "json.kind"}, {"label": "kind"}])
def test_extensions_that_do_not_occur_are_refused_as_options(tree: Path, tmp_path: Path, given: dict[str, str]) -> None:
    shards = write_shards(tree, tmp_path / "shards")
    column, name = list(given.items())[-1]
    assert f"--columns {column}={name}: no sample has this file for the {column}" in fault_of(
        shards, ConfigError, columns=given
    )


def test_images_beside_texts_in_class_folders_are_no_shard(tree: Path, tmp_path: Path) -> None:
    for file in (tree / "train").rglob("*.png"):
        file.with_suffix(".txt").write_text("a caption")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tree / "train", arcname=".")
    assert read_source(str(tmp_path / "x.tar"), 0.2).kind == "images"


def test_samples_without_an_image_or_label_are_counted(tree: Path, tmp_path: Path) -> None:
    samples = samples_of(tree / "train")
    del samples[0]["png"], samples[1]["cls"]
    write_with_tarfile(tmp_path / "x.tar", samples)
    source = read_source(str(tmp_path / "x.tar"), 0.2)
    assert source.notes["skipped"] == {"rows without a label": 1, "samples without an image": 1}


def test_what_is_no_shard_or_has_other_labels_is_refused(tree: Path, tmp_path: Path) -> None:
    shards = write_shards(tree, tmp_path / "shards")
    assert "missing: 1 of 4 shards, such as " in fault_of(shards / "my-train-{0000..0003}.tar")
    assert "stands for more than 100,000 files" in fault_of(shards / "{0..9999999}.tar", ConfigError)
    samples = samples_of(tree / "train")
    for change, says in (
        ({"jpg": samples[0]["png"]}, "has the images png and jpg; choose one with --columns image=EXTENSION"),
        ({"cls": b"\xff\xfe"}, "'000000': the file cls cannot be read as a label: "),
        ({"cls": b"7" * 2**21}, "'000000': the file cls cannot be read as a label: it is too large"),
    ):
        write_with_tarfile(shards / "my-train-0000.tar", [{**samples[0], **change}, *samples[1:]])
        assert says in fault_of(shards)
    write_with_tarfile(shards / "my-train-0000.tar", samples[:30])
    data = (shards / "my-val-0000.tar").read_bytes()
    (shards / "my-val-0000.tar").write_bytes(data[:5000])
    assert "my-val-0000.tar is damaged: it ends without the mark" in fault_of(shards)
    with tarfile.open(shards / "my-val-0000.tar", "w:gz"):
        pass
    assert "my-val-0000.tar is no uncompressed tar file" in fault_of(shards)


def test_folder_of_other_tars_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_with_tarfile(tmp_path / "tars" / "x.tar", [{"__key__": "1", "bin": b"x"}])
    assert "has tar files without images that have labels; expected class folders, or WebDataset" in fault_of(
        tmp_path / "tars"
    )


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("x.tar", ["x.tar"]),
        ("x-{08..11}.tar", ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{1..0}", ["a/1", "a/0", "b/1", "b/0"]),
        ("{a{1,2},b}", ["a1", "b", "a2"]),
    ],
)
def test_braces_stand_for_paths(pattern: str, paths: list[str]) -> None:
    assert expand_braces(pattern) == paths
