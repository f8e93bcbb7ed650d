"""Read a CSV file that lists image files with their labels and, optionally, their splits."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import ConfigError, DataError, format_count
from ...files import quote_path
from ..samples import Source
from .labeled_rows import LABEL_NAMES, Row, Table, build_source, split_of_path
from .request import SourceRequest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
USUAL_NAMES = {
    "image": ("path", "file", "filename", "filepath", "file_name", "image", "image_path", "img"),
    "label": (*LABEL_NAMES, "category"),
    "split": ("split", "set", "subset"),
}


def read_csv(request: SourceRequest) -> Source | None:
    """Return the images that a CSV file lists; None for anything else.

    Paths are relative to the folder of the CSV file. Missing images are reported only when they are read.

    Raises:
        ConfigError: If a given column does not exist.
        DataError: If the file is damaged, or its columns are not those of paths and labels.
    """
    file = request.path.absolute()
    if not file.is_file() or file.suffix.lower() not in DELIMITERS:
        return None
    table = Table("csv")
    try:
        for number, (path, label, split) in enumerate(_read_lines(file, request.columns), start=2):
            image = os.path.normpath(file.parent / path)
            if (stamp := _stamp(image)) is None:
                table.skipped["folders, pipes, sockets and devices"] += 1
                continue
            part = split_of_path(split) if split else "train"
            if part is None:
                raise DataError(f"{quote_path(file)}, row {number}: the split {split!r} is not train, val or test")
            table.splits.setdefault(part, []).append(Row(path, label or None, image, stamp))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{quote_path(file)} is not a CSV file in UTF-8: {error}") from None
    if not table.splits.get("train"):
        raise DataError(f"{quote_path(file)} lists no images for training")
    if all(str(row.label or 0).isdecimal() for rows in table.splits.values() for row in rows):
        for split, rows in table.splits.items():
            table.splits[split] = [row._replace(label=int(row.label) if row.label else None) for row in rows]
    table.origins = dict.fromkeys(table.splits, file.name)
    return build_source(table, request)


def _read_lines(file: Path, given: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the path, the label and the split (empty if there is none) of each row."""
    with file.open(newline="", encoding="utf-8-sig") as text:
        lines = csv.reader(text, delimiter=DELIMITERS[file.suffix.lower()], strict=True)
        header = [name.strip() for name in next(lines, [])]
        places = {what: _find_column(file, what, header, given) for what in USUAL_NAMES}
        for number, line in enumerate(lines, start=2):
            if not line:
                continue
            if len(line) != len(header):
                raise DataError(
                    f"{quote_path(file)}, row {number}: {format_count(len(line), 'value')}, but the header has"
                    f" {len(header)}"
                )
            path, label, split = (line[place].strip() if place is not None else "" for place in places.values())
            if not path or "\0" in path:
                raise DataError(f"{quote_path(file)}, row {number}: no path")
            yield path, label, split


def _find_column(file: Path, what: str, header: Sequence[str], given: Mapping[str, str]) -> int | None:
    have = ", ".join(header[:10]) or "nothing"
    if what in given:
        if given[what] not in header:
            raise ConfigError(f"--columns {what}={given[what]}: no such column in {file.name}: it has {have}")
        return header.index(given[what])
    found = [place for place, name in enumerate(header) if name.lower() in USUAL_NAMES[what]]
    if len(found) == 1:
        return found[0]
    if what == "split" and not found:
        return None
    problem = "several columns" if found else "no column"
    if len(header) == 1 and ";" in header[0]:
        raise DataError(f"{quote_path(file)}: its first line is {have}; separate columns with commas, not semicolons")
    raise DataError(
        f"{quote_path(file)} has {problem} for the {what}: its first line is {have}; expected path,label or"
        f" path,label,split, or --columns {what}=NAME"
    )


def _stamp(path: str) -> tuple[int, int] | None:
    """Return the size and modification time of a file, (-1, -1) if it is missing, and None for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
