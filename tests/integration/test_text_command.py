"""Text from the command line, and shards of tokens that another program has written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_files import read_windows, write_texts

from bigincubate.data.dataset import open_dataset
from bigincubate.data.partitions import partition_by_domain
from bigincubate.data.text import chunks, extraction
from bigincubate.data.text.prepare import prepare_text
from bigincubate.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "source")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(extraction, "GROUP_FILES", 7)


# ------------------------------------------------------------------------------------------------ the command


def test_command_prints_progress_and_summary(
    texts: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("data", "prepare", texts, "--out", tmp_path / "out", "--jobs", 1, "--window", 32)
    code, out, err = call(*words, "--balanced", "domain")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "preparing: 100 of 100 percent" in lines
    assert lines[-2] == "domains (training + validation): a 19 + 1, b 19 + 1, c 19 + 1"
    counts = open_dataset(tmp_path / "out").samples
    assert lines[-1] == (
        f"{tmp_path}/out: {counts['train']} train, {counts['val']} val windows of 32 tokens, a vocabulary of 257,"
        f" 3 partitions; use it with --set data.path={tmp_path}/out"
    )
    code, _, err = call(*words, "--balanced", "domain", "--parts", 4)
    assert (code, err) == (2, "bigincubate: --parts 4: the text has 3 domains; use --parts 3 or omit it\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--window", "8", "--resize", "8"], "--resize is for images: omit it, or omit --window"),
        (["--window", "8", "--max-pixels", "8"], "--max-pixels is for images: omit it, or omit --window"),
        (["--window", "8", "--columns", "image=a"], "--columns is for images: omit it, or omit --window"),
        (["--tokenizer", "bytes"], "--tokenizer is for text: add --window N"),
        (["--column", "body"], "--column is for text: add --window N"),
        (["--balanced", "domain"], "--balanced domain is for text: add --window N"),
        (["--window", "8", "--tokenizer", "bpe"], "tokenizer bpe: expected bpe:N with a vocabulary of N tokens"),
        (["--window", "8", "--tokenizer", "bpe:257"], "tokenizer bpe:257: expected bpe:N with a vocabulary of N"),
    ],
)
def test_options_that_do_not_belong_together_are_one_line(
    texts: Path, tmp_path: Path, options: list[str], says: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = call("data", "prepare", texts, "--out", tmp_path / "out", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert not (tmp_path / "out").exists()


def test_text_without_a_window_gets_a_hint(
    texts: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    for source in (texts, "stdlib", "made-up-text", texts / "a" / "0000.txt", tmp_path / "a.jsonl"):
        code, _, err = call("data", "prepare", source, "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (3, 1)
        assert "to prepare text for a language model, add --window 256" in err


# ------------------------------------------------------------------------------------------------ shards of tokens


def write_token_shards(
    root: Path, encoding: str, *, length: float = 33, vocabulary: int = 257, compression: str | None = None
) -> np.ndarray:
    """Write training and validation samples as llm-foundry does; return those of training."""
    from streaming import MDSWriter

    tokens = np.random.RandomState(0).randint(0, vocabulary, (60, 33))
    for split, rows in (("train", tokens[:50]), ("val", tokens[50:])):
        with MDSWriter(
            columns={"tokens": encoding}, out=str(root / split), size_limit=4000, compression=compression
        ) as writer:
            for row in rows:
                value = (
                    row.astype(np.int64).tobytes()[: int(8 * length)] if encoding == "bytes" else row.astype(np.int32)
                )
                writer.write({"tokens": value})
    return tokens[:50]


@pytest.mark.parametrize("encoding", ["bytes", "ndarray:int32", "ndarray:int32:33"])
def test_shards_of_tokens_are_used_as_they_are(tmp_path: Path, encoding: str) -> None:
    tokens = write_token_shards(tmp_path / "shards", encoding)
    lines: list[str] = []
    out = tmp_path / "out"
    info = prepare_text(str(tmp_path / "shards"), out, window=32, report=lines.append)
    assert (info.schema.columns, info.samples) == ({"tokens": encoding}, {"train": 50, "val": 10})
    assert lines == ["train: 1,650 tokens, 50 windows", "val: 330 tokens, 10 windows"]
    found = [window for windows in read_windows(out, "train") for window in windows]
    assert np.array_equal(found, tokens)
    files = sorted((tmp_path / "shards").rglob("*.mds"))
    assert len(files) >= 3
    assert {file.stat().st_ino for file in files} == {file.stat().st_ino for file in out.rglob("*.mds")}
    assert prepare_text(str(tmp_path / "shards"), out, window=32) == info
    assert prepare_text(str(tmp_path / "shards"), tmp_path / "two", window=32, jobs=2).digest == info.digest
    files[0].with_suffix(".new").write_bytes(files[0].read_bytes()[:-1] + b"\1")
    files[0].with_suffix(".new").replace(files[0])
    with pytest.raises(DataError, match="files were added, removed or changed since"):
        prepare_text(str(tmp_path / "shards"), out, window=32)


@pytest.mark.parametrize(
    ("shape", "options", "kind", "says"),
    [
        ({}, {"window": 16}, ConfigError, "has a sample of 33 tokens; use --window 32 if all have as many"),
        ({"compression": "zstd"}, {}, DataError, "only MDS shards without compression can be used"),
        ({"encoding": "str"}, {}, DataError, "has no column tokens of arrays or bytes"),
        ({}, {"partition": partition_by_domain}, ConfigError, "cannot be divided into parts"),
        ({}, {"tokenizer": "bpe:300"}, ConfigError, "holds tokens already; give the tokenizer.json"),
        ({"vocabulary": 300}, {}, DataError, r"has the token 29\d, but the tokenizer has 257"),
        ({"length": 32.5}, {}, DataError, "is damaged: buffer size must be a multiple of element size"),
    ],
)
def test_other_shards_are_refused(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any], kind: type, says: str
) -> None:
    if "tokenizer" in options:
        pytest.importorskip("tokenizers")
    if shape.get("encoding") == "str":
        (tmp_path / "shards").mkdir()
        for split in ("train", "val"):
            from streaming import MDSWriter

            with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "shards" / split)) as writer:
                writer.write({"text": "a"})
    else:
        write_token_shards(tmp_path / "shards", "bytes", **shape)
    with pytest.raises(kind, match=says) as fault:
        prepare_text(str(tmp_path / "shards"), tmp_path / "out", **{"window": 32, **options})
    assert "\n" not in str(fault.value)
    shutil.rmtree(tmp_path / "shards" / "val")
    with pytest.raises(DataError, match="has shards, but not in both train/ and val/"):
        prepare_text(str(tmp_path / "shards"), tmp_path / "new", window=32)
