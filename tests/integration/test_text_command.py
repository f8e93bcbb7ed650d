"""Prepare text from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from text_files import write_texts

from bigincubate.data.dataset import open_dataset
from bigincubate.data.text import chunks, extraction


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


def test_column_is_refused_for_files_that_have_none(
    texts: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    for source in (texts, "made-up-text"):
        words = ("data", "prepare", source, "--out", tmp_path / "out", "--window", 32, "--column", "body")
        code, _, err = call(*words)
        assert code == 2
        assert err == (
            f"bigincubate: --column body: {source} has no JSON lines or Parquet files, which have columns; omit it\n"
        )
    assert not tmp_path.joinpath("out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--window", "8", "--resize", "8"], "--resize is for images: omit it, or omit --window"),
        (["--window", "8", "--max-pixels", "8"], "--max-pixels is for images: omit it, or omit --window"),
        (["--window", "8", "--columns", "image=a"], "--columns is for images: omit it, or omit --window"),
        (["--tokenizer", "bytes"], "--tokenizer is for text: add --window N"),
        (["--column", "body"], "--column is for text: add --window N"),
        (["--balanced", "domain"], "--balanced domain is for text: add --window N"),
        (["--domain-bytes", "9"], "--domain-bytes is for text: add --window N"),
        (["--development"], "--development is for text: add --window N"),
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
