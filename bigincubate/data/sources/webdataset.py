"""Read WebDataset shards: tar files in which the files of one sample follow each other and differ in their extensions.

``0001.jpg`` and ``0001.cls`` are an image and its label. Sources are a folder of shards, a shard, or a pattern with
braces such as ``shards/train-{000..146}.tar``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, format_count
from ...files import quote_path
from ..samples import Source
from .archives import Archive, Member, list_archive
from .image_files import SUFFIXES
from .labeled_rows import LABEL_NAMES, Row, Table, assign_splits, build_source
from .request import LISTING_THREADS, SourceRequest

SUFFIX = ".tar"
LABEL_EXTENSIONS = ("cls", "json", "txt")
CLASS_NAMES = "classnames.txt"  # a name per line, in the order of the labels
KEY = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # as webdataset divides a name into key and extension
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS, MAX_LABEL_BYTES = 10**5, 2**20


def read_webdataset(request: SourceRequest) -> Source | None:
    """Return the images of WebDataset shards; None if the path is not a shard, a folder of shards or a pattern.

    Raises:
        ConfigError: If a pattern stands for too many files.
        DataError: If a shard is missing or damaged, or no image has a label (with the given extensions).
    """
    if (found := _find_shards(request)) is None:
        return None
    folder, shards = found
    table = Table("webdataset", names=_read_class_names(folder))
    for split, names in shards.items():
        table.origins[split] = names[0] if len(names) == 1 else f"{len(names):,} shards"
        table.splits[split] = []
        if split == "test" and "val" in shards:
            table.origins.pop(split)
            table.skipped["shards of the unused split test"] = len(names)
            continue
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            for rows, skipped in pool.map(partial(_list_shard, folder, request.columns), names):
                table.splits[split] += rows
                table.skipped += skipped
    _check_columns(request.columns, table)
    if not any(table.splits.values()):
        raise DataError(
            f"{quote_path(request.path)} has tar files without images that have labels; expected class folders, or"
            " WebDataset shards with files such as 1.jpg and 1.cls (or other extensions: --columns image=jpg,label=cls)"
        )
    return build_source(table, request)


def _check_columns(columns: Mapping[str, str], table: Table) -> None:
    """Check that the given extensions occur.

    Raises:
        ConfigError: No sample has an image, or a label, with its extension.
    """
    rows = [row for rows in table.splits.values() for row in rows]
    for column, found in (("image", bool(rows)), ("label", any(row.label is not None for row in rows))):
        if column in columns and not found:
            raise ConfigError(
                f"--columns {column}={columns[column]}: no sample has this file for the {column}; give the extension of"
                " a file of each sample, or json.KEY for a key of a JSON file"
            )


def expand_braces(pattern: str) -> list[str]:
    """Return the paths that a pattern stands for: ``{00..12}`` is a range of numbers, ``{a,b}`` a list.

    Raises:
        ConfigError: If there are too many.
    """
    if (match := BRACES.search(pattern)) is None:
        return [pattern]
    if numbers := RANGE.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if "0" in (numbers[1][0], numbers[2][0]) else 0
        step = 1 if first <= last else -1
        choices: Iterable[str] = (f"{number:0{width}}" for number in range(first, last + step, step))
    else:
        choices = match[1].split(",")
    paths: dict[str, None] = {}  # in order; a list inside a list would repeat the outer one
    for choice in choices:
        paths |= dict.fromkeys(expand_braces(pattern[: match.start()] + choice + pattern[match.end() :]))
        if len(paths) > MAX_SHARDS:
            raise ConfigError(f"{pattern} stands for more than {MAX_SHARDS:,} files")
    return list(paths)


def _find_shards(request: SourceRequest) -> tuple[Path, dict[str, list[str]]] | None:
    """Return the folder of the shards, and their paths in it by split."""
    path = request.path
    if path.is_dir():
        found = request.holds(SUFFIX)
        return (path, assign_splits(found, path)) if found else None
    if not os.path.lexists(path) and BRACES.search(str(path)):
        paths = expand_braces(str(path))
        if missing := [name for name in paths if not os.path.isfile(name)]:
            shards = format_count(len(paths), "shard")
            raise DataError(f"missing: {len(missing):,} of {shards}, such as {quote_path(missing[0])}")
        folder = Path(os.path.commonpath([os.path.dirname(name) for name in paths]))
        return folder, assign_splits([os.path.relpath(name, folder) for name in paths], folder)
    archive = request.archive
    if archive is None or archive.form != "tar" or not (request.columns or _is_shard(archive)):
        return None
    return path.parent, {"train": [path.name]}


def _is_shard(archive: Archive) -> bool:
    """Return whether a tar file is a shard: an image has a label, which is a ``cls`` file if it is in a folder."""
    for key, files in _samples(archive, Counter()):
        if any(f".{extension}" in SUFFIXES for extension in files):
            if "cls" in files:
                return True
            if "/" not in key and any(extension in files for extension in LABEL_EXTENSIONS):
                return True
    return False


def _samples(archive: Archive, skipped: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key of each sample and its files by extension."""
    samples: dict[str, dict[str, Member]] = {}
    for member in archive.members:
        match = KEY.fullmatch(member.name)
        if match is None:
            skipped["files without an extension"] += 1
        else:
            samples.setdefault(match[1], {})[match[2].lower()] = member
    yield from samples.items()


def _list_shard(folder: Path, columns: Mapping[str, str], name: str) -> tuple[list[Row], Counter[str]]:
    """Return the images of a shard with their labels, and what is skipped."""
    archive = list_archive(folder / name)
    if archive is None or archive.form != "tar" or archive.compressed:
        raise DataError(f"{quote_path(folder / name)} is no uncompressed tar file; decompress it")
    rows, skipped = list[Row](), archive.skipped
    for key, files in _samples(archive, skipped):
        images = [
            extension
            for extension in files
            if extension == columns.get("image", "").lower() or ("image" not in columns and f".{extension}" in SUFFIXES)
        ]
        if not images:
            skipped["samples without an image"] += 1
            continue
        if len(images) > 1:
            raise DataError(
                f"{quote_path(archive.file)}: {key!r} has the images {' and '.join(images)}; choose one with --columns"
                " image=EXTENSION"
            )
        member = files[images[0]]
        label = _read_label(files, columns.get("label"), f"{quote_path(archive.file)}: {key!r}")
        rows.append(Row(f"{name}/{key}", label, member.stored, (member.size, archive.modified)))
    return rows, skipped


def _read_label(files: Mapping[str, Member], column: str | None, where: str) -> int | str | None:
    """Return the label of a sample; None if it has none.

    Args:
        files: Its files by extension.
        column: The extension of the label, for JSON with a dot and a key: ``json.label``.
        where: The sample, for messages.
    """
    if column is None:
        extension = next((name for name in LABEL_EXTENSIONS if name in files), "")
    else:
        extension = next((name for name in files if f"{column}.".startswith(f"{name}.")), "")
    if not extension:
        return None
    key = (column or "")[len(extension) + 1 :]
    member = files[extension]
    try:
        if member.size > MAX_LABEL_BYTES:
            raise ValueError("it is too large")
        text = member.stored.read().decode().strip()
        if not extension.endswith("json"):
            return int(text) if text.isascii() and text.isdigit() else text or None
        value: Any = json.loads(text)
        if isinstance(value, dict):
            value = value.get(key) if key else next((value[name] for name in LABEL_NAMES if name in value), None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the file {extension} cannot be read as a label: {error}") from None
    if value is not None and type(value) not in (int, str):
        raise DataError(f"{where}: the label {str(value)[:50]!r} in the file {extension} is neither a number nor text")
    return value


def _read_class_names(folder: Path) -> list[str] | None:
    file = folder / CLASS_NAMES
    if not file.is_file():
        return None
    names = [line.strip() for line in file.read_text("utf-8-sig", errors="replace").splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise DataError(f"{quote_path(file)} has a name twice; correct or remove it")
    return names
