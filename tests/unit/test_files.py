"""Files of JSON lines: appended by several processes, cut off by a crash or a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from denied import deny, limit_file_size

from bigincubate.files import append_json_line, hash_file, is_present, read_json_lines, write_text


def test_line_after_an_incomplete_one_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_json_line(file, {"number": 0})
    with file.open("a") as opened:
        opened.write('{"number": 1, "te')
    append_json_line(file, {"number": 2})
    append_json_line(file, {"number": 3})
    assert read_json_lines(file) == [{"number": number} for number in (0, 2, 3)]
    assert len(file.read_text().splitlines()) == 4


def test_line_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"number": 0}\n\xff\xfe\x00\n{"text": "a\xe2\x80\xa8b"}\n')
    assert read_json_lines(file) == [{"number": 0}, {"text": "a\u2028b"}]  # U+2028 ends no line of JSON


def test_file_that_cannot_be_replaced_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(path, "{}")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_text(file, "old")
    with limit_file_size(100), pytest.raises(OSError, match="File too large") as caught:
        write_text(file, "x" * 200)
    assert (caught.value.filename, file.read_text(), list(tmp_path.iterdir())) == (str(file), "old", [file])


def test_folder_that_denies_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    deny(monkeypatch, folder)
    with pytest.raises(PermissionError) as caught:
        write_text(folder / "plan.json", "x")
    assert caught.value.filename == str(folder)


def test_loop_of_links_is_not_present(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert not is_present(loop)
    assert not is_present(tmp_path / "missing")
    assert is_present(tmp_path)


def test_line_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_json_line(file, {"number": 0})
    # the write is short first, as on a full disk
    with limit_file_size(100), pytest.raises(OSError, match="File too large") as caught:
        append_json_line(file, {"text": "x" * 200})
    assert caught.value.filename == str(file)
    assert file.stat().st_size == 100
    append_json_line(file, {"number": 2})
    assert read_json_lines(file) == [{"number": 0}, {"number": 2}]


@pytest.mark.parametrize("call", [read_json_lines, hash_file, partial(append_json_line, value={"number": 0})])
def test_pipe_is_neither_read_nor_written(tmp_path: Path, call: Callable[[Path], object]) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")  # opening it to read would never end
    with pytest.raises(OSError, match="not a file but a folder, pipe or device"):
        call(pipe)
