"""Extract the documents of all files of a source, so that each document can be read by its offset.

    OUT/.documents/<key>.text    the texts of the documents of a group of files, concatenated, in UTF-8
    OUT/.documents/<key>.json    a line for each document: its position, and the hash of its text

The folder is removed when the data is complete. Until then, unchanged files are not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...files import fsync_path
from ..process_pool import run_in_processes
from ..samples import Sample
from ..sources.slices import FileSlice
from .documents import read_documents
from .files import TextFile

EXTRACTED = ".documents"
GROUP_BYTES, GROUP_FILES = 2**24, 2048  # maximum size and number of files that are extracted together


class Extracted(NamedTuple):
    """The documents of a source.

    Attributes:
        documents: The documents, sorted by name, each with the number of its domain as label.
        contents: The SHA-256 of the text of each document, by name.
        domains: The names of the domains.
        files: The SHA-256 of each file, in order.
        unreadable: For each document that cannot be read, the reason by its name.
        empty: Number of documents without text, which are left out.
        duplicates: Number of documents that are left out because an earlier one has the same text.
    """

    documents: list[Sample]
    contents: dict[str, str]
    domains: list[str]
    files: list[str]
    unreadable: dict[str, str]
    empty: int
    duplicates: int


@dataclass(frozen=True)
class _Group:
    """Files that are extracted together."""

    folder: Path
    files: list[TextFile]
    column: str

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self.files, self.column)).encode(errors="surrogateescape")).hexdigest()[:32]

    @property
    def texts(self) -> Path:
        return self.folder / f"{self.key}.text"

    @property
    def index(self) -> Path:
        return self.folder / f"{self.key}.json"


def extract(
    files: Sequence[TextFile],
    out: Path,
    column: str,
    *,
    jobs: int,
    again: bool = False,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Extracted:
    """Return the documents of files, extracted to a folder in ``out``.

    Args:
        files: The files, sorted by name.
        out: The folder of the data.
        column: See `read_documents`.
        jobs: Number of processes.
        again: Whether to read all files, including those that were extracted before.
        on_progress: Called with the fraction of the files that are extracted.
    """
    folder = out / EXTRACTED
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    groups = [_Group(folder, group, column) for group in _group_files(files)]
    missing = [group for group in groups if not group.index.exists()]
    with run_in_processes(_extract_group, missing, jobs, "documents") as extracted:
        for done, _ in enumerate(extracted, start=len(groups) - len(missing) + 1):
            on_progress(done / len(groups))
    kept = {file for group in groups for file in (group.texts, group.index)}
    for file in folder.iterdir():
        if file not in kept:
            file.unlink()
    return _collect(groups)


def _group_files(files: Sequence[TextFile]) -> Iterator[list[TextFile]]:
    group, size = list[TextFile](), 0
    for file in files:
        group.append(file)
        size += file.stamp[0]
        if size >= GROUP_BYTES or len(group) >= GROUP_FILES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _extract_group(group: _Group) -> None:
    """Write the texts of a group, and then its index. An interrupted group has no index and is extracted again."""
    mark = f".tmp-{os.getpid()}"
    texts, index = (file.with_suffix(mark + file.suffix) for file in (group.texts, group.index))
    with texts.open("wb") as data, index.open("w") as lines:
        for number, file in enumerate(group.files):
            for name, text, problem in read_documents(file, group.column):
                content = hashlib.sha256(text).hexdigest() if text.strip() else ""
                _write_line(lines, [number, name, data.tell(), len(text), content, problem])
                data.write(text)
            _write_line(lines, [number, file.hash()])
    for temporary, final in ((texts, group.texts), (index, group.index)):
        fsync_path(temporary)
        temporary.rename(final)


def _write_line(lines: Any, values: list[Any]) -> None:
    lines.write(json.dumps(values) + "\n")


def _collect(groups: Sequence[_Group]) -> Extracted:
    """Return the documents of all groups without the empty ones and duplicates."""
    found: list[tuple[str, str, FileSlice, str]] = []  # name, domain, place, content
    hashes, unreadable, empty = list[str](), dict[str, str](), 0
    for group in groups:
        problems = len(unreadable)
        with group.index.open() as lines:
            for line in lines:
                number, *row = json.loads(line)
                if len(row) == 1:
                    hashes.append(row[0])
                    continue
                name, offset, size, content, problem = row
                if problem:
                    unreadable[name] = problem
                elif not content:
                    empty += 1
                else:
                    place = FileSlice(str(group.texts), offset, size, name)
                    found.append((name, group.files[number].domain, place, content))
        if len(unreadable) > problems:
            # extract the group again next time, because a repaired file may have the same size and time
            group.index.unlink()
    names: dict[str, str] = {}  # for each content, the name of the first document with it
    unique = [row for row in sorted(found) if names.setdefault(row[3], row[0]) == row[0]]
    domains = sorted({domain for _, domain, _, _ in unique})
    labels = {domain: label for label, domain in enumerate(domains)}
    return Extracted(
        [Sample(name, labels[domain], place) for name, domain, place, _ in unique],
        {name: content for content, name in names.items()},
        domains,
        hashes,
        unreadable,
        empty,
        len(found) - len(unique),
    )
