"""Run every command of the page "Your data" that prepares or adopts data, on small files of its form."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mds_files import write_mds
from PIL import Image
from test_data_arrow import write_arrow
from test_data_imagenet import write_published
from test_data_parquet import features, write_parquet
from test_data_webdataset import write_with_tarfile
from text_files import make_text, write_texts

from bigincubate.data.text.tokenizers import train_bpe

PAGE = (Path(__file__).parents[2] / "docs" / "your_data.md").read_text()
COMMANDS = re.findall(r"^bigincubate (data (?:prepare|adopt) .*)$", PAGE, re.MULTILINE)
CLASSES = ["daisy", "tulip"]


def write_everything(folder: Path) -> None:
    """Write the files that the page names, in all forms, from the same photographs."""
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for name in CLASSES:
            (folder / "flowers" / split / name).mkdir(parents=True)
            for row in range(count):
                pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "flowers" / split / name / f"{row}.jpg")
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(folder / f"flowers.{suffix}", mode) as tar:  # type: ignore[call-overload]
            tar.add(folder / "flowers", arcname="flowers")
    shutil.make_archive(str(folder / "flowers"), "zip", folder, "flowers")
    write_published(folder / "imagenet")
    files = {split: sorted((folder / "flowers" / split).rglob("*.jpg")) for split in ("train", "val")}
    for table, header in (("flowers.csv", "path,label,split"), ("photos.csv", "file_id,species,fold")):
        rows = [f"{file.relative_to(folder)},{file.parent.name},{split}" for split in files for file in files[split]]
        (folder / table).write_text("\n".join([header, *rows]))
    arrays = {}
    for split, name in (("train", "train"), ("val", "test")):
        arrays[f"x_{name}"] = np.stack([np.asarray(Image.open(file)) for file in files[split]])
        arrays[f"y_{name}"] = np.array([CLASSES.index(file.parent.name) for file in files[split]])
    np.savez(folder / "flowers.npz", **arrays)
    np.savez(folder / "cells.npz", photos=arrays["x_train"], stages=arrays["y_train"])
    (folder / "shards").mkdir()
    for shard, chosen in (
        ("train-000", files["train"][::2]),
        ("train-001", files["train"][1::2]),
        ("val-000", files["val"]),
    ):
        samples = [
            {
                "__key__": f"{row:05}",
                "jpg": file.read_bytes(),
                "cls": CLASSES.index(file.parent.name),
                "json": {"species": file.parent.name},
            }
            for row, file in enumerate(chosen)
        ]
        write_with_tarfile(folder / "shards" / f"flowers-{shard}.tar", samples)
    if importlib.util.find_spec("pyarrow"):
        for split, name in (("train", "train-00000-of-00001"), ("val", "validation-00000-of-00001")):
            labels = [CLASSES.index(file.parent.name) for file in files[split]]
            images = [file.read_bytes() for file in files[split]]
            species = [file.parent.name for file in files[split]]
            file = folder / "hub" / "data" / f"{name}.parquet"
            write_parquet(file, images, labels, metadata=features(CLASSES), species=species)
            file = folder / "saved" / split / "data-00000-of-00001.arrow"
            write_arrow(file, images, labels, metadata=features(CLASSES))
    for name in ("mds", "mds-names"):
        for split in ("train", "val"):
            write_mds(
                folder / name / split,
                [(file.read_bytes(), CLASSES.index(file.parent.name)) for file in files[split]],
                columns={"img": "jpeg", "y": "int"} if name == "mds" else {"image": "bytes", "label": "str"},
                describe=_describe_mds if name == "mds" else _describe_named_mds,
                size_limit=30_000,
            )
    for split in ("train", "val"):
        write_mds(
            folder / "mds-tokens" / split,
            [(b"some tokens", 0)],
            columns={"ids": "ndarray:uint16"},
            describe=_describe_tokens,
        )
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    write_text_sources(folder)


def _describe_mds(number: int, image: bytes, label: int) -> dict[str, Any]:
    return {"img": Image.open(io.BytesIO(image)), "y": label}


def _describe_tokens(number: int, text: bytes, label: int) -> dict[str, Any]:
    return {"ids": np.frombuffer(text, np.uint8).astype(np.uint16)}


def _describe_named_mds(number: int, image: bytes, label: int) -> dict[str, Any]:
    return {"image": image, "label": CLASSES[label]}


def write_text_sources(folder: Path) -> None:
    """Write the text that the page names, in all forms."""
    write_texts(folder / "manuals")
    texts = [make_text(number) for number in range(40)]
    (folder / "book.txt").write_text("\n\n".join(texts * 20))
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "crawl").mkdir()
    with gzip.open(folder / "crawl" / "000.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow.parquet import write_table

        (folder / "pages").mkdir()
        write_table(pyarrow.table({"text": texts}), folder / "pages" / "000.parquet")
    if importlib.util.find_spec("tokenizers"):
        train_bpe(texts, 300, folder / "tokenizer.json")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    write_everything(folder)
    return folder


def test_page_has_a_command_for_each_form() -> None:
    from bigincubate.data.sources import FORMS

    sources = {shlex.split(command)[2].partition("/")[0] for command in COMMANDS}
    assert len(sources) >= len(FORMS) + 2 - 1  # tar, tar.gz and zip are one form; CIFAR has no command
    assert "mds" in sources


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_page_works(
    command: str, everything: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    words = shlex.split(command)
    if words[2] in ("hub", "saved", "pages") and not importlib.util.find_spec("pyarrow"):
        pytest.skip("needs pyarrow: pip install 'bigincubate[parquet]'")
    if "--tokenizer" in words and not importlib.util.find_spec("tokenizers"):
        pytest.skip("needs tokenizers: pip install 'bigincubate[text]'")
    monkeypatch.chdir(everything)
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    if "--window" in words:
        assert re.search(r"[\d,]+ train, [\d,]+ val windows of (256|64) tokens, a vocabulary of \d+", out)
        return
    pages_form = {"imagenet": "18 train, 6 val images of 3 classes", "cells.npz": "16 train, 4 val images of 2 classes"}
    pages_form["mds-tokens"] = "1 train, 1 val windows of 10 tokens"
    assert pages_form.get(words[2], "20 train, 6 val images of 2 classes") in out


def test_help_lists_the_forms(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("data", "prepare", "--help")
    assert code == 0
    for form in (
        "folder per class",
        "tar.gz or zip",
        "ILSVRC2012",
        "WebDataset",
        "Parquet",
        ".npz",
        ".csv",
        "CIFAR-100",
        ".jsonl.zst",
        "made-up-text",
    ):
        assert form in out
