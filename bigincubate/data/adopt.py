"""Describe data that mosaicml-streaming has written, so that it is read like prepared data, without rewriting it.

Each shard is read once, to record the hashes of its files and to check the labels. The description is a folder of its
own, by default ``adopted`` in that of the data.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, check_integer
from ..files import quote_path
from .chunks import describe_shards
from .dataset import DESCRIPTION, SPLITS, UNFINISHED, DatasetInfo, RecordSchema, open_dataset, read_json
from .images import LABELLED_IMAGE, decode_image
from .mds_index import MdsSplit, read_class_names, read_splits
from .partitions import partition_path
from .process_pool import run_in_processes
from .shards import are_offsets
from .source_summary import describe_counts
from .stored_records import IMAGE_ENCODINGS, INTEGER_ENCODINGS, NAME_ENCODING, RecordReader
from .stored_shards import unpack
from .unfinished import begin_folder, preparing

ADOPTED = "adopted"  # default name of the folder of the description
KIND = "mds"
COLUMNS = {"image": "image", "label": "label"}
MAX_CLASSES = 1_000_000  # without the names of the classes, the largest label decides how many there are


def adopt_dataset(
    source: Path,
    out: Path | None = None,
    *,
    val: Path | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Path | None = None,
    parts: int = 0,
    jobs: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None,
) -> DatasetInfo:
    """Describe an MDS data set of labeled images, unless that was done before.

    Args:
        source: The folder of the training split, or of the splits ``train`` and ``val``.
        out: The folder of the description, which is missing or empty, or has the description of the same data. None:
            ``adopted`` in ``source``.
        val: The folder of the validation split, if it is not ``val`` in ``source``.
        columns: The names of the columns of the ``image`` and the ``label``, if they are different.
        classes: A file with the names of the classes: one per line, or a JSON list. None: the labels as text.
        parts: Number of partitions of the training samples, each of whole shards. 0: none.
        jobs: Number of processes, which does not affect the result.
        on_progress: Called with the number of samples done and the total.
        report: Called with each line of the summary.

    Returns:
        The description of the data set.

    Raises:
        ConfigError: If ``columns``, ``parts`` or ``jobs`` is invalid.
        DataError: If there is no MDS data, it is damaged or cannot be read, or ``out`` contains other files.
        SystemResourceError: If a file cannot be written, or a process was killed.
    """
    check_integer("jobs", jobs)
    source = Path(os.path.abspath(source))
    splits = read_splits(source, val)
    if out is None and not os.access(source, os.W_OK):
        raise ConfigError(f"{quote_path(source)} cannot be written; name a folder for the description with --out DIR")
    out = Path(os.path.abspath(out or source / ADOPTED))
    names = None if classes is None else read_class_names(classes)
    stored = {**COLUMNS, **(columns or {})}
    if unknown := stored.keys() - COLUMNS.keys():
        raise ConfigError(f"--columns {min(unknown)}=…: expected image=NAME,label=NAME")
    plan = _Plan(splits, stored, _find_encodings(splits, stored, names), names, parts)
    with preparing(str(source), out):
        if (out / DESCRIPTION).exists():
            return _reopen(out, plan)
        begin_folder(out, KIND, str(source))
        scanned = _scan_all(plan, jobs, on_progress)
        return _describe(out, source, plan, scanned, report)


@dataclass(frozen=True)
class _Plan:
    """What is adopted, and how.

    Attributes:
        splits: The splits.
        stored: The name of each column in the shards.
        encodings: The encoding of each column.
        classes: The names of the classes, if they are given.
        parts: Number of partitions.
    """

    splits: dict[str, MdsSplit]
    stored: dict[str, str]
    encodings: dict[str, str]
    classes: list[str] | None
    parts: int

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the description, as plain JSON values."""
        indexes = {split: mds.digest for split, mds in self.splits.items()}
        given = {"columns": self.stored, "class_names": self.classes, "number_of_parts": self.parts}
        return {"kind": KIND, "indexes": indexes, **given}

    def schema(self, classes: list[str]) -> RecordSchema:
        """Return the schema of the records."""
        return RecordSchema(LABELLED_IMAGE, self.encodings, {"classes": classes})


def _find_encodings(splits: dict[str, MdsSplit], stored: dict[str, str], classes: list[str] | None) -> dict[str, str]:
    """Return the encoding of the image and of the label.

    Raises:
        ConfigError: If a column is missing or holds neither an image nor a label, or the splits differ.
    """
    found: dict[str, str] = {}
    for split, mds in splits.items():
        for name, column in stored.items():
            encoding = mds.layout.get(column)
            if encoding is None:
                columns = ", ".join(f"{other} ({kind})" for other, kind in mds.layout.items())
                raise ConfigError(
                    f"{mds.folder} has no column {column!r}, but {columns}; name them with: --columns"
                    " image=NAME,label=NAME"
                )
            if found.setdefault(name, encoding) != encoding:
                raise ConfigError(f"column {column!r} is {found[name]} in {SPLITS[0]}, but {encoding} in {split}")
    if found["image"] not in IMAGE_ENCODINGS:
        raise ConfigError(
            f"column {stored['image']!r} is {found['image']}, but an image is {', '.join(IMAGE_ENCODINGS)}"
        )
    if found["label"] not in (*INTEGER_ENCODINGS, NAME_ENCODING):
        raise ConfigError(f"column {stored['label']!r} is {found['label']}, but a label is an integer or text (str)")
    if found["label"] == NAME_ENCODING and classes is None:
        raise ConfigError(
            f"column {stored['label']!r} holds the names of classes; list all of them in a --classes FILE"
        )
    return found


def _reopen(out: Path, plan: _Plan) -> DatasetInfo:
    """Return a data set that was adopted before."""
    info = open_dataset(out)
    before = read_json(out / DESCRIPTION).get("source")
    identity = plan.identity
    if not isinstance(before, dict) or any(before.get(key) != value for key, value in identity.items()):
        raise DataError(
            f"{quote_path(out)} describes other data, or the same with other options; use another --out, or delete it"
            " if no run uses it"
        )
    (out / UNFINISHED).unlink(missing_ok=True)
    return info


# ------------------------------------------------------------------------------------------------ reading


class _Shard(NamedTuple):
    """A shard to read, which can be pickled."""

    split: str
    number: int
    folder: Path
    entry: dict[str, Any]
    schema: RecordSchema
    stored: dict[str, str]
    named: bool  # whether the schema has the names of the classes


class _Scanned(NamedTuple):
    """What was found in a shard: its entry in the index with all hashes, and how often each label occurs."""

    split: str
    number: int
    entry: dict[str, Any]
    labels: Counter[int]


def _scan_all(plan: _Plan, jobs: int, on_progress: Callable[[int, int], None]) -> dict[str, list[_Scanned]]:
    schema = plan.schema(plan.classes or [])
    shards = [
        _Shard(split, number, mds.folder, entry, schema, plan.stored, plan.classes is not None)
        for split, mds in plan.splits.items()
        for number, entry in enumerate(mds.shards)
    ]
    done, total = 0, sum(int(shard.entry["samples"]) for shard in shards)
    found: dict[str, list[_Scanned]] = {split: [] for split in plan.splits}
    on_progress(done, total)
    with run_in_processes(_scan, shards, jobs, "results") as results:
        for scanned in results:
            found[scanned.split].append(scanned)
            done += scanned.labels.total()
            on_progress(done, total)
    return {split: sorted(group, key=lambda scanned: scanned.number) for split, group in found.items()}


def _scan(shard: _Shard) -> _Scanned:
    """Read a shard: check what its index says of it, hash it, and count its labels."""
    entry, packed = shard.entry, shard.entry["zip_data"]
    file = shard.folder / (packed or entry["raw_data"])["basename"]
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    entry = dict(entry)
    if packed:
        entry["zip_data"] = _checked(packed, content, str(file))
        content = unpack(entry["compression"], content, str(file))
    entry["raw_data"] = _checked(entry["raw_data"], content, f"{file}, unpacked," if packed else str(file))
    entry["hashes"] = ["sha256"]
    return _Scanned(shard.split, shard.number, entry, _count_labels(shard, content, file))


def _checked(described: dict[str, Any], content: bytes, name: str) -> dict[str, Any]:
    """Return the entry of a file with its SHA-256.

    Raises:
        DataError: If the file does not have the size and the hashes that its writer noted.
    """
    from ..compat.streaming_package import get_hash, is_hash

    if len(content) != described["bytes"]:
        raise DataError(f"{name} is damaged: {len(content)} bytes, expected {described['bytes']}; copy it again")
    for algorithm, expected in described["hashes"].items():
        if is_hash(algorithm) and get_hash(algorithm, content) != expected:
            raise DataError(f"{name} is damaged: its {algorithm} is not the one in its index; copy it again")
    return {**described, "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}


def _count_labels(shard: _Shard, content: bytes, file: Path) -> Counter[int]:
    """Return how often each label of a shard occurs, and check that its first image can be read.

    Raises:
        DataError: If a record cannot be read, or its label is not that of a class.
    """
    samples, labels = int(shard.entry["samples"]), Counter[int]()
    head = content[: 4 * (samples + 2)]
    begins = np.frombuffer(head, np.uint32)[1:] if len(head) == 4 * (samples + 2) else np.empty(0, np.uint32)
    if not are_offsets(begins, samples, len(content)):
        raise DataError(f"{file} is not a shard of {samples} samples; copy it again")
    reader = RecordReader(shard.schema, shard.stored)
    names, sizes = shard.entry["column_names"], shard.entry["column_sizes"]
    classes = len(shard.schema.metadata["classes"]) if shard.named else MAX_CLASSES
    for row in range(samples):
        record = content[begins[row] : begins[row + 1]]
        try:
            label = reader.read(record, names, sizes, only=("label",))["label"]
            if not 0 <= label < classes:
                advice = "add its name to --classes" if shard.named else "name the classes with --classes"
                raise ValueError(f"label {label} is not in 0 to {classes - 1}; {advice}, or use another column")
            if row == 0:
                decode_image(reader.read(record, names, sizes, only=("image",))["image"])
        except (ValueError, IndexError) as error:
            raise DataError(f"{file}, row {row}: {error}") from None
        labels[label] += 1
    return labels


# ------------------------------------------------------------------------------------------------ describing


def _describe(
    out: Path, source: Path, plan: _Plan, scanned: dict[str, list[_Scanned]], report: Callable[[str], None]
) -> DatasetInfo:
    """Write the descriptions of the partitions and of the whole data set."""
    labels = {split: sum((one.labels for one in group), Counter[int]()) for split, group in scanned.items()}
    largest = max(label for counts in labels.values() for label in counts)
    classes = plan.classes or [str(label) for label in range(largest + 1)]
    counts = {split: [labels[split][label] for label in range(len(classes))] for split in scanned}
    schema, stored = plan.schema(classes), {"stored_columns": plan.stored}
    entries = {split: [one.entry for one in group] for split, group in scanned.items()}
    origin = {**plan.identity, "summary": {"counts": counts}}
    digests = []
    for number, chosen in enumerate(_divide(plan, len(entries["train"]))):
        folder = Path(partition_path(out, number))
        own = {"train": [entries["train"][index] for index in chosen], "val": entries["val"]}
        more: dict[str, Any] = {"part": number, "of": labels["train"].total(), **stored}
        digests.append(_write(folder, source, plan, schema, own, origin, more))
        samples = sum(int(entry["samples"]) for entry in own["train"])
        report(f"part {number}: {len(chosen)} shard{'s' * (len(chosen) != 1)}, {samples:,} images")
    if digests:
        report("parts are whole shards, so their sizes and classes differ; `data prepare --parts` makes balanced ones")
    more = {"parts": digests, **stored} if digests else stored
    _write(out, source, plan, schema, entries, origin, more)
    (out / UNFINISHED).unlink()
    report(describe_counts("classes", counts, classes))
    if empty := [name for name, count in zip(classes, counts["train"], strict=True) if not count]:
        others = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        report(f"classes without training images: {', '.join(empty[:5])}{others}")
    return open_dataset(out)


def _write(
    folder: Path,
    source: Path,
    plan: _Plan,
    schema: RecordSchema,
    entries: dict[str, list[dict[str, Any]]],
    origin: dict[str, Any],
    more: dict[str, Any],
) -> str:
    """Write one description and return its digest."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    # a folder inside that of the data stays valid if both are moved
    real, root = folder.resolve(), source.resolve()
    folders = {}
    for split, mds in plan.splits.items():
        place = mds.folder.resolve()
        together = real.is_relative_to(root) and place.is_relative_to(root)
        folders[split] = os.path.relpath(place, real) if together else str(place)
    return describe_shards(folder, schema, entries, origin, more, folders)


def _divide(plan: _Plan, shards: int) -> Sequence[Sequence[int]]:
    """Return the numbers of the shards of each partition: those of a subfolder, if there are as many of these.

    Raises:
        ConfigError: If there are too few shards.
    """
    parts = plan.parts
    if parts > shards:
        raise ConfigError(
            f"--parts {parts}: a part is one or more whole shards, but there are {shards}; use `data prepare` for"
            " balanced parts"
        )
    folders = [entry["raw_data"]["basename"].rpartition("/")[0] for entry in plan.splits["train"].shards]
    names = sorted(set(folders))
    if parts and len(names) == parts:
        return [[number for number, folder in enumerate(folders) if folder == name] for name in names]
    return [range(part, shards, parts) for part in range(parts)]
