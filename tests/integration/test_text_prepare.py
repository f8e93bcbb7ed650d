"""Prepare windows of tokens from text: every token is stored exactly once, and interruptions do not change a bit."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_trees import read_contents
from text_files import join_windows, make_text, read_listed, read_windows, split_documents, write_texts

from bigincubate.data.dataset import open_dataset
from bigincubate.data.partitions import partition_by_class, partition_by_domain, partition_by_hash
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.text import chunks, extraction, stored_tokenizer
from bigincubate.data.text.prepare import prepare_text
from bigincubate.data.text.tokenizers import SEPARATOR, ByteTokenizer, load_tokenizer
from bigincubate.errors import ConfigError, DataError

FORK = multiprocessing.get_context("fork")
TOKENIZERS = [
    "bytes",
    pytest.param(
        "bpe:300",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("tokenizers"), reason="needs tokenizers: pip install 'bigincubate[text]'"
        ),
    ),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "source")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(extraction, "GROUP_FILES", 7)


def stored_texts(folder: Path, split: str) -> list[str]:
    """Return the documents whose tokens are in the windows of a split."""
    tokenizer = load_tokenizer(open_dataset(folder))
    return [
        tokenizer.decode(document)
        for windows in read_windows(folder, split)
        for document in split_documents(join_windows(windows), tokenizer.separator)
    ]


# ------------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_byte_of_validation_is_a_target_once(texts: Path, tmp_path: Path, tokenizer: str) -> None:
    info = prepare_text(str(texts), tmp_path / "out", window=32, tokenizer=tokenizer, val_fraction=0.4)
    assert info == open_dataset(tmp_path / "out")
    listed = [row["name"] for row in read_listed(tmp_path / "out") if row["split"] == "val"]
    expected = [(texts / name).read_bytes().decode() for name in listed]
    assert sorted(stored_texts(tmp_path / "out", "val")) == sorted(expected)
    shards = read_windows(tmp_path / "out", "val")
    assert len(shards) > 2
    lengths = load_tokenizer(info).byte_lengths()
    scored = sum(int(lengths[window[1:]].sum()) for windows in shards for window in windows)
    assert scored == sum(len(text.encode()) for text in expected)
    assert info.samples["val"] == sum(map(len, shards))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_windows_of_training_are_full_and_separators_only_before_documents(
    texts: Path, tmp_path: Path, tokenizer: str
) -> None:
    info = prepare_text(str(texts), tmp_path / "out", window=32, tokenizer=tokenizer)
    shards = read_windows(tmp_path / "out", "train")
    assert {(len(window), window.dtype) for windows in shards for window in windows} == {(33, np.dtype(np.uint16))}
    expected = {(texts / row["name"]).read_bytes().decode() for row in read_listed(tmp_path / "out")}
    found = stored_texts(tmp_path / "out", "train")
    incomplete = [text for text in found if text not in expected]
    assert len(incomplete) <= len(shards)  # only the last document of a chunk may be truncated
    assert all(any(whole.startswith(text.rstrip("\ufffd")) for whole in expected) for text in incomplete)
    assert any(SEPARATOR in text for text in found)
    metadata = info.schema.metadata
    assert (info.schema.kind, info.schema.columns) == ("tokens", {"tokens": "ndarray:uint16"})
    assert (metadata["window"], metadata["domains"]) == (32, ["a", "b", "c"])
    assert (metadata["vocabulary"], metadata["separator"]) == ((257, 256) if tokenizer == "bytes" else (300, 0))


def test_split_is_by_document_and_domain(texts: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    prepare_text(str(texts), tmp_path / "out", window=32, val_fraction=0.1, report=lines.append)
    rows = read_listed(tmp_path / "out")
    assert len(rows) == 60
    for domain in "abc":
        own = [row["split"] for row in rows if row["domain"] == domain]
        assert (own.count("train"), own.count("val")) == (18, 2)
    assert "domains (training + validation): a 18 + 2, b 18 + 2, c 18 + 2" in lines
    shutil.copytree(texts, tmp_path / "more")
    (tmp_path / "more" / "a" / "new.txt").write_text("one more")
    prepare_text(str(tmp_path / "more"), tmp_path / "out2", window=32, val_fraction=0.1)
    moved = {row["name"]: row["split"] for row in rows}.items() - {
        row["name"]: row["split"] for row in read_listed(tmp_path / "out2")
    }.items()
    assert len(moved) <= 1


def test_summary_counts_what_is_stored(texts: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    info = prepare_text(str(texts), tmp_path / "out", window=32, report=lines.append)
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]["summary"]
    assert summary["windows"] == info.samples
    sizes = dict.fromkeys(info.samples, 0)
    for row in read_listed(tmp_path / "out"):
        sizes[row["split"]] += (texts / row["name"]).stat().st_size
    assert summary["bytes"] == sizes
    documents = {split: sum(counts) for split, counts in summary["documents"].items()}
    assert summary["tokens"] == {split: sizes[split] + documents[split] for split in sizes}
    assert lines[0] == (
        f"train: {documents['train']} documents, {sizes['train']:,} bytes, {summary['tokens']['train']:,} tokens,"
        f" {info.samples['train']:,} windows"
    )


# ------------------------------------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_result_does_not_depend_on_the_number_of_processes(texts: Path, tmp_path: Path, tokenizer: str) -> None:
    seen: list[tuple[int, int]] = []
    one = prepare_text(
        str(texts), tmp_path / "one", window=32, tokenizer=tokenizer, on_progress=lambda *now: seen.append(now)
    )
    three = prepare_text(str(texts), tmp_path / "three", window=32, tokenizer=tokenizer, jobs=3)
    assert one.digest == three.digest
    assert read_contents(tmp_path / "one") == read_contents(tmp_path / "three")
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        *("dataset.json", "documents.jsonl", "train", "val"),
        *(["tokenizer.json"] if tokenizer != "bytes" else []),
    }


def _die(source: str, out: Path, jobs: int, tokenizer: str, where: Any, name: str, calls: int) -> None:
    """Prepare data, and kill all processes of it when a function is called for the n-th time."""
    count, function = FORK.Value("i", 0), getattr(where, name)

    def call_or_die(*arguments: Any, **options: Any) -> Any:
        with count.get_lock():
            count.value += 1
            if count.value == calls:
                os.killpg(0, signal.SIGKILL)
        return function(*arguments, **options)

    os.setpgid(0, 0)
    setattr(where, name, call_or_die)
    prepare_text(source, out, window=32, tokenizer=tokenizer, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (extraction, "read_documents", 30),
        (stored_tokenizer, "train_bpe", 1),
        (chunks, "cut_windows", 4),
        (chunks, "write_json", 4),
    ],
)
def test_killed_preparation_resumes(
    texts: Path, tmp_path: Path, where: Any, name: str, calls: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    prepare_text(str(texts), tmp_path / "whole", window=32, tokenizer="bpe:300")
    out = tmp_path / "out"
    child = FORK.Process(target=_die, args=(str(texts), out, jobs, "bpe:300", where, name, calls))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    records = {file.stem for file in (out / ".chunks").glob("*-*.json")} if (out / ".chunks").exists() else set()
    assert len(records) == (3 if name == "write_json" else 0) or jobs > 1 or name == "cut_windows"
    written: list[str] = []

    def write_and_note(chunk: Any) -> int:
        written.append(chunk.record_file.stem)
        return write(chunk)

    from bigincubate.data.text import prepare as preparing

    write = preparing.write_text_chunk
    monkeypatch.setattr(preparing, "write_text_chunk", write_and_note)
    prepare_text(str(texts), out, window=32, tokenizer="bpe:300")
    assert not records & set(written)
    assert read_contents(out) == read_contents(tmp_path / "whole")


def test_prepared_again_is_the_same_and_changes_are_refused(texts: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(texts, source)
    info = prepare_text(str(source), out, window=32)
    before = read_contents(out)
    for file in source.rglob("*.txt"):
        os.utime(file)  # only the modification time changes
    assert prepare_text(str(source), out, window=32) == info
    file = source / "a" / "0001.txt"
    text, status = file.read_bytes(), file.stat()
    file.write_bytes(b"X" + text[1:])
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="files were added, removed or changed since"):
        prepare_text(str(source), out, window=32, check=True)
    file.write_bytes(text)
    (source / "a" / "new.txt").write_text("one more")
    with pytest.raises(DataError, match="files were added, removed or changed since"):
        prepare_text(str(source), out, window=32)
    assert read_contents(out) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 33}, "was prepared with window 32, not 33; delete it or use another folder"),
        ({"val_fraction": 0.3}, "with val_fraction 0.05, not 0.3"),
        ({"tokenizer": "bpe:300"}, "with tokenizer bytes, not bpe:300"),
        ({"partition": lambda samples: partition_by_hash(samples, 2)}, "was prepared with other parts"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    if "tokenizer" in options:
        pytest.importorskip("tokenizers")
    prepare_text("made-up-text", tmp_path / "out", window=32)
    with pytest.raises(DataError, match=says):
        prepare_text("made-up-text", tmp_path / "out", **{"window": 32, **options})


def test_folder_of_images_or_of_other_files_is_refused(tmp_path: Path) -> None:
    prepare_dataset("made-up", tmp_path / "images")
    prepare_text("made-up-text", tmp_path / "text", window=64)
    with pytest.raises(DataError, match="holds data from another source"):
        prepare_text("made-up-text", tmp_path / "images", window=64)
    with pytest.raises(DataError, match="holds data from another source"):
        prepare_dataset("made-up", tmp_path / "text")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("do not delete")
    with pytest.raises(DataError, match="holds other files"):
        prepare_text("made-up-text", tmp_path / "thesis", window=64)
    with pytest.raises(ConfigError, match="is inside the source"):
        prepare_text(str(tmp_path / "thesis"), tmp_path / "thesis" / "out", window=64)


# ------------------------------------------------------------------------------------------------ what is left out


def test_empty_documents_and_duplicates_are_left_out(texts: Path, tmp_path: Path) -> None:
    plain = prepare_text(str(texts), tmp_path / "plain", window=32)
    source = tmp_path / "source"
    shutil.copytree(texts, source)
    for name in ("0000.txt", "0001.txt"):
        shutil.copy(source / "a" / name, source / "c" / f"copy-{name}")
    (source / "b" / "empty.txt").write_text("")
    (source / "b" / "blank.txt").write_text(" \n\n")
    lines: list[str] = []
    info = prepare_text(str(source), tmp_path / "out", window=32, report=lines.append)
    assert "left out: 2 duplicates; 2 empty documents" in lines
    assert info.digest == plain.digest


@pytest.mark.parametrize("jobs", [1, 2])
def test_document_that_is_not_utf8_is_reported(texts: Path, tmp_path: Path, jobs: int) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(texts, source)
    file = source / "b" / "latin.txt"
    file.write_bytes("naïve text".encode("latin-1"))
    status = file.stat()
    with pytest.raises(DataError, match=r"1 document cannot be read: b/latin.txt: not UTF-8.*--skip-bad"):
        prepare_text(str(source), out, window=32, jobs=jobs)
    assert (out / "unreadable-files.txt").read_text() == "b/latin.txt: not UTF-8: convert it with iconv\n"
    lines: list[str] = []
    skipped = prepare_text(str(source), tmp_path / "skipped", window=32, skip_bad=True, report=lines.append)
    assert skipped.digest == prepare_text(str(texts), tmp_path / "plain", window=32).digest
    assert "left out: 1 unreadable document, listed in unreadable-files.txt" in lines
    file.write_bytes(b"naive text")  # of the same size
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    repaired = prepare_text(str(source), out, window=32, jobs=jobs)
    assert not (out / "unreadable-files.txt").exists()
    assert repaired.digest == prepare_text(str(source), tmp_path / "fresh", window=32).digest != skipped.digest


@pytest.mark.parametrize(
    ("write", "window", "says"),
    [
        (
            lambda root: (root / "a.txt").write_text("alone"),
            32,
            "has too few different documents with text, 1, .* validation",
        ),
        (
            lambda root: [(root / f"{n}.txt").write_text(f"{n}") for n in range(9)],
            32,
            "has no 33 tokens for one window",
        ),
        (lambda root: (root / "a.txt").write_text("\n"), 32, "has too few different documents with text, 0, "),
    ],
)
def test_too_little_text_is_one_line(tmp_path: Path, write: Callable[[Path], object], window: int, says: str) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    with pytest.raises(DataError, match=says) as fault:
        prepare_text(str(tmp_path / "source"), tmp_path / "out", window=window)
    assert "\n" not in str(fault.value)


# ------------------------------------------------------------------------------------------------ parts, tokenizers


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_part_has_the_documents_of_its_domain(texts: Path, tmp_path: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"window": 16, "tokenizer": tokenizer, "partition": partition_by_domain}
    info = prepare_text(str(texts), out, **options)
    assert len(info.parts) == 3
    whole = sorted(stored_texts(out, "train"))
    found = []
    for number, domain in enumerate("abc"):
        part = open_dataset(out / "parts" / f"{number:02}")
        assert (part.part, part.of, part.digest) == (number, info.samples["train"], info.parts[number])
        assert load_tokenizer(part).vocabulary == info.schema.metadata["vocabulary"]
        own = stored_texts(part.path, "train")
        own_files = [file.read_bytes().decode() for file in (texts / domain).iterdir()]
        assert all(any(text.startswith(one.rstrip("\ufffd")) for text in own_files) for one in own)
        assert stored_texts(part.path, "val") == stored_texts(out, "val")
        found += own
    assert sorted(found) == whole
    assert prepare_text(str(texts), out, **options) == info
    with pytest.raises(DataError, match="was prepared with other parts"):
        prepare_text(str(texts), out, window=16, tokenizer=tokenizer)


def test_parts_are_balanced_by_domain(texts: Path, tmp_path: Path) -> None:
    def divide(samples: Any) -> Any:
        return partition_by_class(samples, 2)

    prepare_text(str(texts), tmp_path / "out", window=16, partition=divide)
    rows = [row for row in read_listed(tmp_path / "out") if row["split"] == "train"]
    counts = {
        (domain, part): sum((row["domain"], row["part"]) == (domain, part) for row in rows)
        for domain in "abc"
        for part in range(2)
    }
    assert sum(counts.values()) == 57
    assert all(abs(counts[domain, 0] - counts[domain, 1]) <= 1 for domain in "abc")


def test_file_of_a_tokenizer_gives_the_same_tokens(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    trained = prepare_text(str(texts), tmp_path / "trained", window=32, tokenizer="bpe:300")
    file = tmp_path / "trained" / "tokenizer.json"
    info = prepare_text(str(texts), tmp_path / "given", window=32, tokenizer=str(file), jobs=2)
    assert info.schema.metadata["tokenizer"] == {
        "name": "file",
        "sha256": trained.schema.metadata["tokenizer"]["sha256"],
    }
    for name in ("train/index.json", "val/index.json", "tokenizer.json"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()
    assert prepare_text(str(texts), tmp_path / "given", window=32, tokenizer=str(file)) == info
    (tmp_path / "given" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is damaged: SHA-256"):
        load_tokenizer(info)
    (tmp_path / "given" / "tokenizer.json").unlink()
    loaded = load_tokenizer(info, remote=str(tmp_path / "trained"))
    assert loaded.decode(loaded.encode("tide 東京")) == "tide 東京"


def test_tokenizer_of_other_documents_is_trained_again_when_preparation_resumes(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(texts, source)
    child = FORK.Process(target=_die, args=(str(source), out, 1, "bpe:300", chunks, "cut_windows", 3))
    child.start()
    child.join()
    assert (out / "tokenizer.json").exists()
    for number in range(40):
        (source / "a" / f"new{number}.txt").write_text(f"{number} squid anchor " * 9)
    resumed = prepare_text(str(source), out, window=32, tokenizer="bpe:300")
    fresh = prepare_text(str(source), tmp_path / "fresh", window=32, tokenizer="bpe:300")
    assert read_contents(out) == read_contents(tmp_path / "fresh")
    assert resumed.digest == fresh.digest
    assert not set(read_listed(out)[0]) - {"name", "domain", "split", "part"}


def test_json_lines_and_one_file_of_text(tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    prepare_text(str(tmp_path / "a.jsonl"), tmp_path / "out", window=16, column="body", val_fraction=0.5)
    assert set(stored_texts(tmp_path / "out", "val")) <= set(texts)
    assert len(stored_texts(tmp_path / "out", "val")) == 30
    (tmp_path / "book.txt").write_text("".join(f"Line {number} of a book.\n" for number in range(4000)))
    info = prepare_text(str(tmp_path / "book.txt"), tmp_path / "book", window=16)
    assert info.schema.metadata["domains"] == ["text"]
    assert 0 < info.samples["val"] < info.samples["train"] / 2


def test_standard_library_is_described_with_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**22)
    lines: list[str] = []
    info = prepare_text("stdlib", tmp_path / "out", window=4096, report=lines.append)
    source = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]
    assert (source["kind"], source["summary"]["interpreter"].split()[0]) == ("stdlib", "CPython")
    assert any(line.startswith("modules of CPython 3.") for line in lines)
    assert ByteTokenizer().decode(read_windows(tmp_path / "out", "val")[0][0][1:]).isprintable() is False
    assert info.samples["train"] > 2000
