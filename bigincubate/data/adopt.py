"""Describe data that mosaicml-streaming has written, so that it is read like prepared data without rewriting it.

Each shard is read once, to record the hashes of its files and to check the labels or tokens. The description is a
separate folder, by default ``adopted`` in the folder of the data.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, check_integer, format_count
from ..files import check_is_file, quote_path, unreadable_error
from .adopted_images import AdoptedImages, AdoptedRecords, Description
from .chunks import describe_shards
from .dataset import DESCRIPTION, SPLITS, UNFINISHED, DatasetInfo, open_dataset, read_json
from .mds_index import MdsSplit, read_splits
from .partitions import partition_path
from .process_pool import run_in_processes
from .remote import download
from .shards import are_offsets
from .stored_records import RecordReader
from .stored_shards import unpack
from .unfinished import begin_folder, preparing

ADOPTED = "adopted"  # default name of the folder of the description
KIND = "mds"


def adopt_dataset(
    source: Path | str,
    out: Path | None = None,
    *,
    val: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Path | None = None,
    tokenizer: str | None = None,
    parts: int = 0,
    jobs: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None,
) -> DatasetInfo:
    """Describe an MDS data set of labeled images or windows of tokens, unless it has been described before.

    Args:
        source: The folder of the training split, or of the splits ``train`` and ``val``; as text, the URL of an object
            store, whose shards are downloaded one at a time. With ``val``, a URL is that of the training split.
        out: The folder of the description. It may be missing, empty, or contain a description of the same data. None:
            ``adopted`` in ``source``, which then must be a folder.
        val: The folder or URL of the validation split, if it is not ``val`` in ``source``.
        columns: The names of the columns with the ``image`` and the ``label``, if they have other names; or that of the
            column with the ``tokens`` of text.
        classes: A file with the names of the classes: one per line, or a JSON list. None: the classes are numbered.
        tokenizer: The tokenizer that made the tokens: ``bytes``, or the path of a ``tokenizer.json``.
        parts: Number of partitions of the training samples, each of whole shards. 0: none.
        jobs: Number of processes, which does not affect the result.
        on_progress: Called with the number of samples done and the total.
        report: Called with each line of the summary.

    Returns:
        The description of the data set.

    Raises:
        ConfigError: If ``columns``, ``tokenizer``, ``parts`` or ``jobs`` is invalid.
        MissingDependencyError: If the library of the tokenizer is not installed.
        DataError: If there is no MDS data, it is damaged or cannot be read, or ``out`` contains other files.
        SystemResourceError: If a file cannot be written, or a process was killed.
    """
    check_integer("jobs", jobs)
    if isinstance(source, Path):
        source = Path(os.path.abspath(source))
        if out is None and source.is_dir() and os.access(source, os.W_OK):
            out = source / ADOPTED
    splits = read_splits(source, val)
    if out is None:
        name = quote_path(source) if isinstance(source, Path) else source
        raise ConfigError(f"{name} cannot be written; name a folder for the description with --out DIR")
    out = Path(os.path.abspath(out))
    records = _find_records(splits, columns or {}, classes, tokenizer)
    plan = _Plan(source, splits, records, _divide(splits["train"], parts))
    with preparing(str(source), out):
        if (out / DESCRIPTION).exists():
            return _reopen(out, plan)
        begin_folder(out, KIND, str(source))
        scanned = _scan_all(plan, jobs, on_progress)
        return _describe(out, plan, scanned, report)


@dataclass(frozen=True)
class _Plan:
    """The data to adopt.

    Attributes:
        source: The folder or URL that was passed to `adopt_dataset`.
        splits: The splits.
        records: Their records.
        parts: The numbers of the training shards of each partition.
    """

    source: Path | str
    splits: dict[str, MdsSplit]
    records: AdoptedRecords
    parts: list[list[int]]

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that determines the description, as plain JSON values."""
        indexes = {split: mds.digest for split, mds in self.splits.items()}
        return {"kind": KIND, "indexes": indexes, "shards_of_parts": self.parts, **self.records.given}


def _find_records(
    splits: dict[str, MdsSplit], columns: Mapping[str, str], classes: Path | None, tokenizer: str | None
) -> AdoptedRecords:
    if "tokens" not in columns:
        if tokenizer is not None:
            raise ConfigError("--tokenizer is for tokens: name their column with --columns tokens=NAME, or omit it")
        return AdoptedImages.find(splits, columns, classes)
    from .text.adopted_windows import AdoptedWindows

    if classes is not None:
        raise ConfigError("--classes is for images: omit it")
    return AdoptedWindows.find(splits, columns, tokenizer)


def _divide(train: MdsSplit, parts: int) -> list[list[int]]:
    """Return the numbers of the shards of each partition. If there are ``parts`` subfolders, each is one partition.

    Raises:
        ConfigError: If there are too few shards.
    """
    shards = len(train.shards)
    if parts > shards:
        raise ConfigError(
            f"--parts {parts}: a part has at least one whole shard, but there are only {shards}; use `data prepare` for"
            " balanced parts"
        )
    folders = [entry["raw_data"]["basename"].rpartition("/")[0] for entry in train.shards]
    names = sorted(set(folders))
    if parts and len(names) == parts:
        return [[number for number, folder in enumerate(folders) if folder == name] for name in names]
    return [list(range(part, shards, parts)) for part in range(parts)]


def _reopen(out: Path, plan: _Plan) -> DatasetInfo:
    """Return a data set that was adopted before.

    Raises:
        DataError: If the description is of other data or was made with other options.
    """
    info = open_dataset(out)
    before = read_json(out / DESCRIPTION).get("source")
    identity = plan.identity
    if not isinstance(before, dict) or any(before.get(key) != value for key, value in identity.items()):
        raise DataError(
            f"{quote_path(out)} describes other data, or was written with other options; use another --out, or delete"
            " it if no run uses it"
        )
    (out / UNFINISHED).unlink(missing_ok=True)
    return info


# ------------------------------------------------------------------------------------------------ reading


class _Shard(NamedTuple):
    """A shard to read. It can be pickled."""

    split: str
    number: int
    folder: Path | str
    entry: dict[str, Any]
    records: AdoptedRecords


class _Scanned(NamedTuple):
    """The result of reading a shard: its entry in the index with all hashes, and the counts of its measures."""

    split: str
    number: int
    entry: dict[str, Any]
    counts: Counter[int]


def _scan_all(plan: _Plan, jobs: int, on_progress: Callable[[int, int], None]) -> dict[str, list[_Scanned]]:
    shards = [
        _Shard(split, number, mds.folder, entry, plan.records)
        for split, mds in plan.splits.items()
        for number, entry in enumerate(mds.shards)
    ]
    done, total = 0, sum(int(shard.entry["samples"]) for shard in shards)
    found: dict[str, list[_Scanned]] = {split: [] for split in plan.splits}
    on_progress(done, total)
    with run_in_processes(_scan, shards, jobs, "results") as results:
        for scanned in results:
            found[scanned.split].append(scanned)
            done += scanned.counts.total()
            on_progress(done, total)
    return {split: sorted(group, key=lambda scanned: scanned.number) for split, group in found.items()}


def _scan(shard: _Shard) -> _Scanned:
    """Read a shard: compare it with its index, hash it, and check and count its records."""
    entry, packed = shard.entry, shard.entry["zip_data"]
    name = (packed or entry["raw_data"])["basename"]
    file, content = f"{shard.folder}/{name}", _read_stored(shard.folder, name)
    entry = dict(entry)
    if packed:
        entry["zip_data"] = _checked(packed, content, file)
        content = unpack(entry["compression"], content, file)
    entry["raw_data"] = _checked(entry["raw_data"], content, f"{file}, unpacked," if packed else file)
    entry["hashes"] = ["sha256"]
    return _Scanned(shard.split, shard.number, entry, _count_records(shard, content, file))


def _read_stored(folder: Path | str, name: str) -> bytes:
    """Return the content of a stored file.

    Raises:
        DataError: If it is missing, or cannot be downloaded.
        SystemResourceError: If it cannot be read.
    """
    if isinstance(folder, Path):
        try:
            check_is_file(folder / name)
            return (folder / name).read_bytes()
        except OSError as error:
            raise unreadable_error(error, folder / name, DataError) from None
    with TemporaryDirectory() as own, download(f"{folder}/{name}", Path(own, "shard")) as file:
        return file.read_bytes()


def _checked(described: dict[str, Any], content: bytes, name: str) -> dict[str, Any]:
    """Return the entry of a file with its SHA-256.

    Raises:
        DataError: If the file does not have the size and the hashes in its index.
    """
    from ..compat.streaming_package import get_hash, is_hash

    if len(content) != described["bytes"]:
        raise DataError(f"{name} is damaged: {len(content)} bytes, expected {described['bytes']}; copy it again")
    for algorithm, expected in described["hashes"].items():
        if is_hash(algorithm) and get_hash(algorithm, content) != expected:
            raise DataError(f"{name} is damaged: its {algorithm} is not the one in its index; copy it again")
    return {**described, "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}


def _count_records(shard: _Shard, content: bytes, file: str) -> Counter[int]:
    """Return how often each measure (see `AdoptedRecords.measure`) occurs in a shard.

    Raises:
        DataError: If a record is not valid.
    """
    samples, counts = int(shard.entry["samples"]), Counter[int]()
    head = content[: 4 * (samples + 2)]
    begins = np.frombuffer(head, np.uint32)[1:] if len(head) == 4 * (samples + 2) else np.empty(0, np.uint32)
    if not are_offsets(begins, samples, len(content)):
        raise DataError(f"{file} is not a shard of {samples} samples; copy it again")
    reader = RecordReader(shard.records.reading_schema, shard.records.stored)
    names, sizes = shard.entry["column_names"], shard.entry["column_sizes"]
    for row in range(samples):
        record = content[begins[row] : begins[row + 1]]
        read = partial(_read_column, reader, record, names, sizes)
        try:
            counts[shard.records.measure(read, first=row == 0)] += 1
        except (ValueError, IndexError) as error:
            raise DataError(f"{file}, row {row}: {error}") from None
    return counts


def _read_column(
    reader: RecordReader, record: bytes, names: Sequence[str], sizes: Sequence[int | None], column: str
) -> Any:
    return reader.read(record, names, sizes, only=(column,))[column]


# ------------------------------------------------------------------------------------------------ describing


def _describe(out: Path, plan: _Plan, scanned: dict[str, list[_Scanned]], report: Callable[[str], None]) -> DatasetInfo:
    """Write the descriptions of the partitions and of the whole data set."""
    counts = {split: sum((shard.counts for shard in group), Counter[int]()) for split, group in scanned.items()}
    described = plan.records.describe(counts)
    entries = {split: [shard.entry for shard in group] for split, group in scanned.items()}
    digests = []
    for number, chosen in enumerate(plan.parts):
        folder = Path(partition_path(out, number))
        own = {**entries, "train": [entries["train"][index] for index in chosen]}
        digests.append(_write(folder, plan, described, own, {"part": number, "of": counts["train"].total()}))
        samples = sum(int(entry["samples"]) for entry in own["train"])
        report(f"part {number}: {format_count(len(chosen), 'shard')}, {format_count(samples, plan.records.unit)}")
    if digests:
        report("parts are whole shards, so their sizes and classes differ; `data prepare --parts` makes balanced ones")
    _write(out, plan, described, entries, {"parts": digests} if digests else {})
    (out / UNFINISHED).unlink()
    for line in described.lines:
        report(line)
    return open_dataset(out)


def _write(
    folder: Path, plan: _Plan, described: Description, entries: dict[str, list[dict[str, Any]]], more: dict[str, Any]
) -> str:
    """Write one description and return its digest."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    plan.records.add_files(folder)
    folders = {split: _find_folder(folder, plan.source, mds.folder) for split, mds in plan.splits.items()}
    origin = {**plan.identity, "summary": described.summary}
    more = {**more, "stored_columns": plan.records.stored}
    return describe_shards(folder, described.schema, entries, origin, more, folders)


def _find_folder(folder: Path, source: Path | str, stored: Path | str) -> str:
    """Return where the shards of a split are: a URL, an absolute path, or a path relative to the description.

    With a relative path, a description inside the folder of the data stays valid if both are moved.

    Args:
        folder: The folder of the description.
        source: The folder or URL that was given.
        stored: The folder or URL of the shards.
    """
    if isinstance(stored, str):
        return stored
    real, place = folder.resolve(), stored.resolve()
    if isinstance(source, Path):
        root = source.resolve()
        if real.is_relative_to(root) and place.is_relative_to(root):
            return os.path.relpath(place, real)
    return str(place)
