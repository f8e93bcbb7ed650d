"""The format of a prepared data set: a folder of MDS shards with a description and hashes of all files.

    DIR/dataset.json                  the description; written last, so a folder without it is incomplete
    DIR/train/index.json              size and SHA-256 of every shard
    DIR/train/00000/shard.00000.mds   samples: `image` (the bytes of an image file), `label` (an integer)
    DIR/val/...
    DIR/parts/00/...                  optional: a partition of the training samples, in the same format
    DIR/verified.json                 which shards were found to match their hashes (`verification`)

`dataset.json` contains the SHA-256 of both indexes, and an index contains those of its shards. Therefore the digest of
the data set covers every byte.

An adopted data set (`adopt`) has the same description and indexes, but its shards are those of mosaicml-streaming, in
the folders that `dataset.json` names under `folders`. They may be compressed, and their columns may have other names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, format_command
from ..files import MISSING_OR_WRONG_TYPE, is_present, quote_path, read_small_file, unreadable_error, write_text
from .remote import fetch, is_url

FORMAT = 1
SPLITS = ("train", "val")
PARTS = "parts"
DESCRIPTION = "dataset.json"
UNFINISHED = ".preparing.json"  # in place of the description until the data is complete
INDEX = "index.json"
# optional keys of dataset.json: digests of the partitions; or for a partition, its number and the size of the whole
# or for an adopted data set, the name that each column has in the shards
OPTIONAL_KEYS = ("parts", "part", "of", "stored_columns")
MISSING = -1  # instead of the size of a file
REPREPARE_HINT = "delete the folder and prepare the data again"
UNSAFE_ENCODING = "pkl"
# raised when JSON has an unexpected structure
INVALID_JSON_ERRORS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class RecordSchema:
    """The type of a data set's records.

    Attributes:
        kind: Kind of record, such as ``"labelled_image"``; each task reads one kind.
        columns: MDS encoding of each column.
        metadata: Further properties of the records (plain JSON values), such as the names of classes.
    """

    kind: str
    columns: dict[str, str]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a data set.

    Attributes:
        path: The folder.
        schema: Schema of the records.
        samples: Number of samples in each split.
        digest: SHA-256 (hexadecimal) of the schema, the records, their order and the partitions.
        parts: Digests of the partitions of the training samples; empty without partitions.
        part: For a partition, its number; otherwise None.
        of: For a partition, the number of training samples in the whole data set; otherwise None.
        stored_columns: For an adopted data set, the name that each column has in the shards; otherwise None.
        folders: For an adopted data set, the folder of the shards of each split: a URL, absolute, or relative to
            ``path`` (or to the URL that the data set is downloaded from); otherwise None.
    """

    path: Path
    schema: RecordSchema
    samples: dict[str, int]
    digest: str
    parts: Sequence[str] = ()
    part: int | None = None
    of: int | None = None
    stored_columns: dict[str, str] | None = None
    folders: dict[str, str] | None = None

    @property
    def adopted(self) -> bool:
        """Return whether the shards were written by mosaicml-streaming."""
        return self.folders is not None

    @property
    def repair_hint(self) -> str:
        """Return what to do if a stored file is damaged."""
        if self.adopted:
            return f"restore it, or delete {quote_path(self.path)} and run `bigincubate data adopt` again"
        return REPREPARE_HINT

    def stored_folder(self, split: str, remote: str | None = None) -> str:
        """Return the path or URL of the folder in which the shards of a split are stored.

        Args:
            split: The split.
            remote: URL from which the data set is downloaded.
        """
        if self.folders is None:
            return f"{remote or self.path}/{split}"
        folder = self.folders[split]
        if is_url(folder):
            return folder
        if remote and "://" in remote and not os.path.isabs(folder):
            scheme, _, path = remote.partition("://")
            return f"{scheme}://{posixpath.normpath(posixpath.join(path, folder))}"
        return os.path.realpath(os.path.join(remote or self.path, folder))

    @property
    def epoch(self) -> int:
        """Return the number of samples in an epoch: for a partition, that of the whole data set."""
        return self.of or self.samples["train"]


def open_dataset(path: Path | str, remote: str | None = None) -> DatasetInfo:
    """Read the description of a data set and check its indexes.

    Args:
        path: The folder.
        remote: URL from which a missing description and its indexes are downloaded.

    Raises:
        DataError: If there is no data set, or its description, an index or a shard is damaged.
    """
    path = Path(path)
    if remote and not _is_described(path):
        fetch(remote, path, [*[f"{split}/{INDEX}" for split in SPLITS], DESCRIPTION])
    info, splits = _read_description(path)
    try:
        for split in SPLITS:
            _check_index(info, split, splits[split], present=remote is None and not is_url(info.stored_folder(split)))
    except INVALID_JSON_ERRORS:
        raise DataError(f"{path}: the description or an index is damaged; {REPREPARE_HINT}") from None
    return info


def describe_dataset(path: Path | str, remote: str | None = None) -> DatasetInfo:
    """Read only ``dataset.json``. The samples may be missing, as at a site that has only one partition.

    Args:
        path: The folder.
        remote: URL from which a missing description is downloaded.

    Raises:
        DataError: If the description is missing or damaged.
    """
    path = Path(path)
    if remote and not _is_described(path):
        fetch(remote, path, [DESCRIPTION])
    return _read_description(path)[0]


def _is_described(path: Path) -> bool:
    try:
        return is_present(path / DESCRIPTION)
    except OSError as error:
        raise unreadable_error(error, path, DataError) from None


def _read_description(path: Path) -> tuple[DatasetInfo, dict[str, Any]]:
    if not _is_described(path):
        raise DataError(f"no data in {quote_path(path)}: {_explain_missing(Path(os.path.abspath(path)))}")
    description = read_json(path / DESCRIPTION)
    try:
        if description["format"] != FORMAT:
            raise DataError(
                f"{path}: data format {description['format']!r}, but this version reads {FORMAT}; {REPREPARE_HINT}"
            )
        schema = RecordSchema(description["kind"], description["columns"], description["metadata"])
        splits, digest = description["splits"], description["digest"]
        more = {key: description[key] for key in OPTIONAL_KEYS if key in description}
        expected = compute_dataset_digest(schema, splits, more)
        folders = _checked_names(description["folders"], SPLITS) if "folders" in description else None
        if ("stored_columns" in more) != (folders is not None):
            raise ValueError("only adopted data has both")
        if folders is not None:
            _checked_names(more["stored_columns"], schema.columns)
        samples = {split: splits[split]["samples"] for split in SPLITS}
        info = DatasetInfo(path, schema, samples, digest, **more, folders=folders)
    except INVALID_JSON_ERRORS:
        raise DataError(f"{path}: the description is damaged; {REPREPARE_HINT}") from None
    if digest != expected:
        raise DataError(f"{path / DESCRIPTION} is damaged: its digest does not match; {REPREPARE_HINT}")
    return info, splits


def _checked_names(value: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return a mapping of exactly these keys to text, as it was read from JSON.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, dict) and value.keys() == set(keys) and all(isinstance(name, str) for name in value.values()):
        return value
    raise ValueError(f"{value!r} has other keys or values")


def _explain_missing(path: Path) -> str:
    """Return what a folder without a description holds instead, and what to do."""
    prepare = f"prepare it with: {format_command('data', 'prepare', 'SOURCE', '--out', path)}"
    whole = path.parent.parent
    if path.parent.name == PARTS and (whole / DESCRIPTION).exists():
        return f"part {path.name} of {quote_path(whole)} is not here; copy it from where the data was prepared"
    if not os.path.lexists(path):
        others = [other.parent.name for other in path.parent.glob(f"*/{DESCRIPTION}")]
        similar = difflib.get_close_matches(path.name, others, n=1)
        did_you_mean = f" (did you mean {quote_path(path.with_name(similar[0]))}?)" if similar else ""
        return f"no such folder{did_you_mean}; {prepare}"
    if not path.is_dir():
        return "it is not a folder; name the folder that `bigincubate data prepare SOURCE --out DIR` has written"
    if (path / UNFINISHED).exists():
        return "it is not complete; run the same `bigincubate data prepare` again to finish it"
    if below := [other.parent for other in sorted(path.glob(f"*/{DESCRIPTION}"))]:
        return f"it is not prepared data, but {', '.join(quote_path(folder) for folder in below[:3])} is"
    if (path / PARTS).is_dir() or any((path / split / INDEX).exists() for split in SPLITS):
        adopt = format_command("data", "adopt", path)
        return (
            f"{DESCRIPTION} is missing next to the samples; copy it from where the data was prepared, or if"
            f" mosaicml-streaming has written them, use: {adopt}"
        )
    found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if not found:
        return f"the folder is empty; {prepare}"
    names = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    command = format_command("data", "prepare", path, "--out", "DIR")
    return f"it holds {names}, not prepared data; if these are images, prepare them with: {command}"


def compute_dataset_digest(schema: RecordSchema, splits: dict[str, dict[str, Any]], more: dict[str, Any]) -> str:
    """Return the digest of a data set, which does not depend on where the data came from.

    Args:
        schema: Schema of the records.
        splits: Number of samples and SHA-256 of the index of each split.
        more: Values of the keys in ``OPTIONAL_KEYS``, if any.
    """
    contents = [FORMAT, schema.kind, schema.columns, schema.metadata, splits, more]
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_index(info: DatasetInfo, split: str, expected: dict[str, Any], *, present: bool) -> None:
    """Refuse an index that names files outside its folder or was changed after it was written.

    Metadata is slow on a parallel file system: each shard and each folder of shards takes one call.
    """
    file = info.path / split / INDEX
    folder = Path(info.stored_folder(split)) if present else info.path / split
    lookup, content = _Lookup(folder), _read_content(file)
    index, hint = _parse_json(file, content), info.repair_hint
    for shard in index["shards"]:
        raw = shard["raw_data"]
        stored = (shard["zip_data"] or raw) if info.adopted else raw
        if info.adopted and not _is_adopted_shard(shard, info):
            raise DataError(f"{file}: shard {raw['basename']!r} was not described by `bigincubate data adopt`")
        # links are followed in adopted data, as in a cache of the Hugging Face Hub: this folder was chosen by the user
        size = _file_size(folder / stored["basename"]) if info.adopted else lookup.size(stored["basename"])
        if size is None:
            raise DataError(f"{file}: shard {stored['basename']!r} lies outside its folder; refused")
        if not (info.adopted or _is_own_shard(shard, info)):
            raise DataError(f"{file}: shard {raw['basename']!r} was not written by `bigincubate data prepare`")
        # a sample takes at least 4 bytes of its shard
        if not 0 <= int(shard["samples"]) <= int(raw["bytes"]) // 4:
            raise DataError(
                f"{file}: shard {raw['basename']!r} cannot hold {shard['samples']} samples; {REPREPARE_HINT}"
            )
        if present and size == MISSING:
            raise DataError(f"{folder / stored['basename']} is missing; {hint}")
        if present and size != stored["bytes"]:
            raise DataError(
                f"{folder / stored['basename']} is damaged: {size} bytes, expected {stored['bytes']}; {hint}"
            )
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected["index"] or expected["samples"] != sum(shard["samples"] for shard in index["shards"]):
        raise DataError(f"{file} is damaged: SHA-256 {digest}, expected {expected['index']}; {hint}")


def _is_own_shard(shard: dict[str, Any], info: DatasetInfo) -> bool:
    layout = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    foreign = shard["format"] != "mds" or shard["compression"] or shard["zip_data"]
    return not foreign and layout == info.schema.columns and "sha256" in shard["raw_data"]["hashes"]


def _is_adopted_shard(shard: dict[str, Any], info: DatasetInfo) -> bool:
    layout = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    files = [file for file in (shard["raw_data"], shard["zip_data"]) if file]
    columns = info.schema.columns.items()
    return (
        shard["format"] == "mds"
        and UNSAFE_ENCODING not in layout.values()
        and all(layout.get((info.stored_columns or {})[name]) == encoding for name, encoding in columns)
        and bool(shard["compression"]) == bool(shard["zip_data"])
        # an unpacked shard is written, so its path must not lead elsewhere
        and all("sha256" in file["hashes"] and is_plain_name(file["basename"]) for file in files)
    )


def is_plain_name(name: str) -> bool:
    """Return whether a path is relative and does not lead upward."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


class _Lookup:
    """Looks up sizes of files below a folder, with one call per file and one per subfolder."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._own_folders = {".": True}  # whether a subfolder is no symbolic link

    def size(self, name: str) -> int | None:
        """Return the size of the regular file ``name``, `MISSING`, or None if it is outside of the folder."""
        if not is_plain_name(name):
            return self._resolved_size(name)
        path = PurePosixPath(name)
        mode, size = self._mode_and_size(name)
        if stat.S_ISLNK(mode) or not all(self._is_own_folder(str(parent)) for parent in path.parents):
            return self._resolved_size(name)
        return size if stat.S_ISREG(mode) else MISSING

    def _is_own_folder(self, name: str) -> bool:
        if name not in self._own_folders:
            self._own_folders[name] = not stat.S_ISLNK(self._mode_and_size(name)[0])
        return self._own_folders[name]

    def _mode_and_size(self, name: str) -> tuple[int, int]:
        try:
            status = os.lstat(self._root / name)
        except OSError as error:
            if error.errno not in MISSING_OR_WRONG_TYPE:
                raise unreadable_error(error, self._root / name, DataError) from None
            return 0, MISSING
        return status.st_mode, status.st_size

    def _resolved_size(self, name: str) -> int | None:
        """Follow symbolic links, which takes more calls."""
        file = (self._root / name).resolve()
        if not file.is_relative_to(self._root):
            return None
        return _file_size(file)


def _file_size(file: Path) -> int:
    """Return the size of a regular file or of one that a link leads to, or `MISSING`.

    Raises:
        SystemResourceError: If this is unknown, because a folder cannot be read.
    """
    try:
        status = file.stat()
    except OSError as error:
        if error.errno not in MISSING_OR_WRONG_TYPE:
            raise unreadable_error(error, file, DataError) from None
        return MISSING
    return status.st_size if stat.S_ISREG(status.st_mode) else MISSING


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DataError: If the file is missing, or does not contain a JSON object.
        SystemResourceError: If it cannot be read.
    """
    return _parse_json(file, _read_content(file))


def _read_content(file: Path) -> bytes:
    try:
        return read_small_file(file)
    except OSError as error:
        hint = "replace the link with the file that it leads to" if os.path.islink(file) else REPREPARE_HINT
        raise unreadable_error(error, file, DataError, hint) from None


def _parse_json(file: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{file} is damaged: not a JSON object; {REPREPARE_HINT}")
    return value


def write_json(file: Path, value: dict[str, Any]) -> str:
    """Write a JSON object to a file atomically and return the SHA-256 of the file."""
    text = json.dumps(value, sort_keys=True, indent=1) + "\n"
    write_text(file, text)
    return hashlib.sha256(text.encode()).hexdigest()
