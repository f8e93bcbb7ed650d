"""The indexes of data that mosaicml-streaming has written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ConfigError, DataError, format_command
from ..files import check_is_file, is_present, list_folder, quote_path, read_json, read_small_file, unreadable_error
from .dataset import (
    DESCRIPTION,
    INDEX,
    INVALID_JSON_ERRORS,
    SPLITS,
    UNSAFE_ENCODING,
    is_plain_name,
)
from .remote import download


@dataclass(frozen=True)
class MdsSplit:
    """The shards of one split.

    Attributes:
        folder: The folder that the paths in ``shards`` are relative to; text if it is a URL.
        shards: The entries of the index.
        layout: Encoding of each column.
        digest: SHA-256 (hexadecimal) of ``shards``.
    """

    folder: Path | str
    shards: list[dict[str, Any]]
    layout: dict[str, str]
    digest: str


def read_splits(source: Path | str, val: Path | str | None) -> dict[str, MdsSplit]:
    """Read the indexes of the training and the validation split.

    Args:
        source: The folder or URL of the splits ``train`` and ``val``, or of the training split. A URL is that of the
            training split if ``val`` is given.
        val: The folder or URL of the validation split, if it is not ``val`` in ``source``.

    Raises:
        DataError: If there is no MDS data, or it cannot be read safely.
    """
    if isinstance(source, str):
        places = (source, val) if val is not None else (f"{source}/train", f"{source}/val")
        return {split: _read_split(place) for split, place in zip(SPLITS, places, strict=True)}
    if not source.is_dir():
        raise DataError(f"no MDS data in {quote_path(source)}: no such folder on this machine")
    if (source / DESCRIPTION).exists():
        raise DataError(f"{quote_path(source)} needs no adoption; use it with --set data.path={quote_path(source)}")
    train, default = source / "train", source / "val"
    if val is None and not (train.is_dir() and default.is_dir()):
        command = format_command("data", "adopt", source, "--val", "DIR")
        raise DataError(
            f"{quote_path(source)} has no folders train and val; name the folder of the validation split: {command}"
        )
    validation = default if val is None else val.absolute() if isinstance(val, Path) else val
    folders = (train if train.is_dir() else source, validation)
    return {split: _read_split(folder) for split, folder in zip(SPLITS, folders, strict=True)}


def holds_mds(folder: Path) -> bool:
    """Return whether a folder, or its folder ``train``, holds shards that have not been adopted yet."""
    if not folder.is_dir() or (folder / DESCRIPTION).exists():
        return False
    indexes = (where / INDEX for where in (folder, folder / "train"))
    return any("shards" in (read_json(index) or {}) for index in indexes if index.is_file())


def _read_split(place: Path | str) -> MdsSplit:
    """Read the index of a folder or URL."""
    if isinstance(place, Path):
        return _read_folder(place, quote_path(place))
    with TemporaryDirectory() as folder:
        with download(f"{place}/{INDEX}", Path(folder, INDEX)):
            pass
        return replace(_read_folder(Path(folder), place), folder=place)


def _read_folder(folder: Path, name: str) -> MdsSplit:
    """Read the index of a folder, or those of its subfolders in the order of their names.

    Args:
        folder: The folder.
        name: Its name in messages.
    """
    try:
        names = [""] if is_present(folder / INDEX) else _find_subfolders(folder)
    except OSError as error:
        raise unreadable_error(error, folder, DataError) from None
    if not names:
        raise DataError(f"{name} holds no MDS data: it has no {INDEX}, and neither have its folders")
    try:
        shards = [shard for subfolder in names for shard in _read_shards(folder, subfolder, name)]
        layouts = [dict(zip(shard["column_names"], shard["column_encodings"], strict=True)) for shard in shards]
    except INVALID_JSON_ERRORS:
        raise DataError(f"{name}: an {INDEX} is damaged; copy it again") from None
    if not any(shard["samples"] for shard in shards):
        raise DataError(f"{name} holds no samples")
    if any(layout != layouts[0] for layout in layouts):
        raise DataError(f"{name}: the shards have different columns; adopt those with the same columns")
    for column, encoding in layouts[0].items():
        if encoding == UNSAFE_ENCODING:
            raise DataError(
                f"{name}: column {column!r} holds pickles, and reading a pickle can run any program; write"
                " the data again with another encoding"
            )
    content = json.dumps(shards, sort_keys=True).encode()
    return MdsSplit(folder, shards, layouts[0], hashlib.sha256(content).hexdigest())


def _find_subfolders(folder: Path) -> list[str]:
    return [f"{path.name}/" for path in list_folder(folder) if is_present(path / INDEX)]


def _read_shards(folder: Path, subfolder: str, name: str) -> list[dict[str, Any]]:
    """Return the entries of one index, with paths relative to ``folder``.

    Args:
        folder: The folder of the split.
        subfolder: Where the index is: empty, or a name that ends with a slash.
        name: Name of the folder in messages.
    """
    from ..compat.streaming_package import is_compression

    shards: list[dict[str, Any]] = []
    file = f"{name}/{subfolder}{INDEX}"
    try:
        index = json.loads(read_small_file((folder / subfolder / INDEX).resolve()))
    except OSError as error:
        raise unreadable_error(error, Path(file), DataError) from None
    if index["version"] != 2:
        raise DataError(f"{file}: version {index['version']!r} of MDS, but only version 2 can be read")
    for shard in index["shards"]:
        if shard["format"] != "mds":
            raise DataError(f"{file}: the shards have the format {shard['format']!r}; only mds can be read")
        if bool(shard["compression"]) != bool(shard["zip_data"]):
            raise ValueError("a compressed shard without its size, or the reverse")
        if shard["compression"] and not is_compression(shard["compression"]):
            raise DataError(f"{file}: the compression {shard['compression']!r} is unknown")
        numbers = [shard["samples"], *(size or 0 for size in shard["column_sizes"])]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{numbers} are not numbers of samples and of bytes")
        entry = dict(shard)
        for key in ("raw_data", "zip_data"):
            if described := shard[key]:
                if not isinstance(described["hashes"], dict):
                    raise ValueError("no hashes")
                if not is_plain_name(described["basename"]):
                    raise DataError(f"{file}: shard {described['basename']!r} lies outside its folder; refused")
                entry[key] = {**described, "basename": subfolder + described["basename"]}
        shards.append(entry)
    return shards


def find_encodings(splits: Mapping[str, MdsSplit], stored: Mapping[str, str]) -> dict[str, str]:
    """Return the encoding of each column of the records.

    Args:
        splits: The splits.
        stored: The name that each column has in the shards.

    Raises:
        ConfigError: If a column is missing, or the splits differ.
    """
    found: dict[str, str] = {}
    for split, mds in splits.items():
        for name, column in stored.items():
            encoding = mds.layout.get(column)
            if encoding is None:
                columns = ", ".join(f"{other} ({kind})" for other, kind in mds.layout.items())
                expected = ",".join(f"{key}=NAME" for key in stored)
                raise ConfigError(
                    f"{mds.folder} has no column {column!r}, but {columns}; name the right ones with: --columns"
                    f" {expected}"
                )
            if found.setdefault(name, encoding) != encoding:
                raise ConfigError(f"column {column!r} is {found[name]} in {SPLITS[0]}, but {encoding} in {split}")
    return found


def read_class_names(file: Path) -> list[str]:
    """Read the names of classes, one per line or as a JSON list.

    Raises:
        DataError: If the file cannot be read, or does not list names, each once.
    """
    try:
        check_is_file(file)
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    try:
        names = json.loads(text) if file.suffix == ".json" else text.split("\n")
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: expected the names of the classes, one per line, or a JSON list in a .json file")
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise DataError(f"{file}: expected a name in each line")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise DataError(f"{file} lists {twice[0]!r} twice")
    return names
