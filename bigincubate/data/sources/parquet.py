"""Read Parquet and Arrow files of Hugging Face: a column of image files and a column of labels.

Data sets on the Hub are Parquet files; ``save_to_disk`` of the library ``datasets`` writes Arrow files. Only the labels
are read at first. An image of a Parquet file cannot be read without those before it in its row group, so the images of
a row group (in Arrow: a record batch) are read together. Needs pyarrow (the extra ``parquet``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, DataError, MissingDependencyError
from ...files import quote_path, read_small_file
from ..samples import Source
from .archives import damaged_archive
from .arrow_tables import ARROW, PARQUET, open_table
from .labeled_rows import LABEL_NAMES, Row, Table, assign_splits, build_source
from .request import SourceRequest
from .slices import check_size

STATE = "state.json"  # beside Arrow files: which of them are the data set, and not results of the library's functions
IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")


class Columns(NamedTuple):
    """The columns of a file.

    Attributes:
        image: Column of image files.
        field: The field of this column that has their bytes; None if the column itself has them.
        label: Column of the labels.
        names: Names of the classes, into which the labels are indexes; None if the file has none.
    """

    image: str
    field: str | None
    label: str
    names: list[str] | None


class TableImage(NamedTuple):
    """An image file in a row of a Parquet or Arrow file.

    Attributes:
        file: Path of the file.
        column: The column.
        field: See `Columns`.
        group: The row group, or the record batch.
        row: Number of the row in its group.
    """

    file: str
    column: str
    field: str | None
    group: int
    row: int

    def __str__(self) -> str:
        what = "record batch" if self.file.lower().endswith(ARROW) else "row group"
        return f"{self.file} ({what} {self.group}, row {self.row})"

    def read(self, limit: int | None = None) -> bytes:
        """Return the bytes of the image file; fast if the last one that was read is shortly before it.

        Raises:
            ValueError: If they are damaged or missing.
        """
        import pyarrow

        try:
            modified = os.stat(self.file).st_mtime_ns
            data = _group_reader(self.file, self.column, self.field, self.group, modified).read(self.row)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"the file is damaged here: {_describe_damage(error)}") from None
        if data is None:
            raise ValueError("there is no image in this row, but at most a path")
        check_size(len(data))
        return data[:limit]


def read_parquet(request: SourceRequest) -> Source | None:
    """Return the images of a Parquet or Arrow file, or of a folder of them; None for anything else.

    Raises:
        ConfigError: If a given column does not exist.
        DataError: If a file is damaged, or its columns are not those of images and labels.
        MissingDependencyError: If pyarrow is not installed.
    """
    suffix = request.path.suffix.lower()
    if request.path.is_file() and suffix in (PARQUET, ARROW):
        folder, files = request.path.parent, {"train": [request.path.name]}
    else:
        suffix, found = next(((one, found) for one in (PARQUET, ARROW) if (found := request.holds(one))), ("", []))
        if not found:
            return None
        folder, files = request.path, assign_splits(_list_data(request.path, found), request.path)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"{quote_path(request.path)}: reading {suffix} files needs pyarrow; install it with: pip install"
            " 'bigincubate[parquet]'"
        ) from None
    table = Table(suffix[1:])
    for split, own in files.items():
        if split == "test" and "val" in files:
            table.skipped[f"{suffix} files of the unused split test"] = len(own)
            continue
        table.origins[split] = own[0] if len(own) == 1 else f"{len(own):,} files"
        table.splits[split] = []
        for name in own:
            names, rows = _list_rows(folder.absolute() / name, name, request.columns)
            if table.names not in (None, names):
                raise DataError(f"{quote_path(folder / name)} has other names of classes than the files before it")
            table.names = names
            table.splits[split] += rows
    return build_source(table, request)


def _list_data(folder: Path, names: list[str]) -> list[str]:
    """Return the files that are the data set, without further Arrow files that the library `datasets` has written.

    Raises:
        DataError: A file of the data set is missing.
    """
    listed: dict[str, set[str] | None] = {}
    for parent in {os.path.dirname(name) for name in names}:
        try:
            files = json.loads(read_small_file(folder / parent / STATE))["_data_files"]
            listed[parent] = {str(file["filename"]) for file in files} or None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            listed[parent] = None
        present = {os.path.basename(name) for name in names if os.path.dirname(name) == parent}
        if missing := (listed[parent] or set()) - present:
            where = quote_path(folder / parent / STATE)
            raise DataError(f"{where} lists {min(missing)!r}, which is not here; copy the folder again")
    return [name for name in names if (own := listed[os.path.dirname(name)]) is None or os.path.basename(name) in own]


def _list_rows(file: Path, name: str, columns: Mapping[str, str]) -> tuple[list[str] | None, list[Row]]:
    """Return the names of the classes and the rows of a file, without reading its images."""
    import pyarrow

    status, rows = file.stat(), list[Row]()
    stamp = (status.st_size, status.st_mtime_ns)
    try:
        with open_table(file) as opened:
            found = _find_columns(file, opened.schema, columns)
            for group, labels in enumerate(opened.read_groups(found.label)):
                block, path, first = f"{name}/{group}", str(file), len(rows)
                rows += [
                    Row(
                        f"{name}/{first + row}",
                        label,
                        TableImage(path, found.image, found.field, group, row),
                        stamp,
                        (block, row),
                    )
                    for row, label in enumerate(labels)
                ]
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged_archive(file, _describe_damage(error)) from None
    return found.names, rows


def _find_columns(file: Path, schema: Any, given: Mapping[str, str]) -> Columns:
    """Return the columns of images and labels.

    Args:
        file: The file, for messages.
        schema: Its Arrow schema.
        given: The columns that the user named.

    Raises:
        ConfigError: If a given column does not exist or has another type.
        DataError: If no column, or more than one, could be meant.
    """
    import pyarrow.types as types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_label(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))

    fields = {field.name: field.type for field in schema}
    if twice := [name for name in fields if schema.names.count(name) > 1]:
        raise DataError(f"{quote_path(file)} has several columns {twice[0]!r}; write it again with different names")
    images: dict[str, str | None] = {name: None for name, kind in fields.items() if is_bytes(kind)}
    for name, kind in fields.items():
        if types.is_struct(kind) and any(inner.name == "bytes" and is_bytes(inner.type) for inner in kind):
            images[name] = "bytes"
    labels = [name for name, kind in fields.items() if is_label(kind)]
    features = _read_features(schema.metadata or {})
    typed = {
        kind: [name for name, feature in features.items() if feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    image = _choose("image", list(images), typed["Image"], IMAGE_NAMES, given, file, fields)
    label = _choose("label", labels, typed["ClassLabel"], LABEL_NAMES, given, file, fields)
    names = features.get(label, {}).get("names")
    if not types.is_integer(fields[label]) or not isinstance(names, list) or len({*map(str, names)}) != len(names):
        names = None
    return Columns(image, images[image], label, names and list(map(str, names)))


def _choose(
    what: str,
    possible: list[str],
    typed: list[str],
    usual: tuple[str, ...],
    given: Mapping[str, str],
    file: Path,
    fields: Mapping[str, Any],
) -> str:
    """Return a column: the one that was given, has the type of Hugging Face, has a usual name, or is the only one."""
    have = ", ".join(f"{name} ({kind})" for name, kind in list(fields.items())[:10])
    if what in given:
        if given[what] not in possible:
            raise ConfigError(
                f"--columns {what}={given[what]}: no such column of {what}s in {file.name}: it has {have}"
            )
        return given[what]
    for names in (typed, [name for name in usual if name in fields], possible):
        if len(found := [name for name in names if name in possible]) == 1:
            return found[0]
        if found:
            raise DataError(
                f"{quote_path(file)}: {', '.join(found)} may be the column of the {what}; choose one with --columns"
                f" {what}=NAME"
            )
    kind = "bytes of image files" if what == "image" else "integers or names of classes"
    raise DataError(f"{quote_path(file)} has no column of {kind}: it has {have or 'no columns'}")


def _read_features(metadata: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return the features that the library `datasets` describes in the metadata of a schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _describe_damage(error: Exception) -> str:
    """Return the first line of an error of pyarrow, which also raises OSError, then without a number.

    Raises:
        OSError: The error is one of the operating system, so the file need not be damaged.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return str(error).partition("\n")[0] or type(error).__name__


# ------------------------------------------------------------------------------------------------ reading images


class _GroupReader:
    """Reads the images of a row group in order, a few rows at a time."""

    def __init__(self, file: str, column: str, field: str | None, group: int) -> None:
        self._place = (file, column, field, group)
        self._batches = self._read_batches()
        self._first, self._batch = 0, list[bytes | None]()

    def read(self, row: int) -> bytes | None:
        if row < self._first:
            self._batches, self._first, self._batch = self._read_batches(), 0, []
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError("the file has fewer rows than before")
            self._batch = batch
        return self._batch[row - self._first]

    def _read_batches(self) -> Iterator[list[bytes | None]]:
        file, column, field, group = self._place
        with open_table(file) as opened:
            for values in opened.read_group(column, field, group):
                yield [value and value[field] for value in values] if field else values


@lru_cache(maxsize=1)
def _group_reader(file: str, column: str, field: str | None, group: int, modified: int) -> _GroupReader:
    return _GroupReader(file, column, field, group)
