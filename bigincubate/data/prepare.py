"""Prepare a data set: write the samples of a source as MDS shards.

Samples are written in chunks (:mod:`.chunks`), so that an interrupted run can resume. A chunk contains samples of only
one partition (:mod:`.partitions`), so that partitions can share the shards of the whole data set. The hash of a
sample's name decides to which chunk it belongs, so that a file that appears or disappears changes only one chunk.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ConfigError, DataError, check_integer
from ..files import quote_path
from .chunk_records import RECORDS, Chunk, ChunkRecord, has_same_contents, is_unchanged, read_record
from .chunks import write_chunk
from .dataset import DESCRIPTION, UNFINISHED, DatasetInfo, open_dataset, read_json
from .descriptions import write_descriptions
from .images import (
    LABELLED_IMAGE_COLUMNS,
    decode_image,
    encode_png,
    encode_resized,
    exif_orientation,
    labelled_image_schema,
)
from .partitions import PartitionFunction
from .process_pool import run_in_processes
from .sample_names import has_names, write_names
from .samples import Sample, Source
from .source_summary import report_unreadable, summarize_source, summary_lines
from .sources import EMBEDDED, read_source
from .splits import hash_name
from .unfinished import begin_folder, preparing, refuse_inside
from .unpacking import unpacked

CHUNK_SAMPLES = 2048  # on average
MAX_BLOCK_CHUNKS = 4  # a block of samples that are read together is divided if it is larger than this many chunks
UNREADABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP)  # errors of one file, not of a disk


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare a data set; see `prepare_dataset`."""

    jobs: int = 1
    max_pixels: int | None = None
    resize: int | None = None
    skip_bad: bool = False
    check: bool = False
    on_progress: Callable[[int, int], None] = lambda done, total: None
    report: Callable[[str], None] = lambda line: None


def prepare_dataset(
    source: str,
    out: Path,
    *,
    jobs: int = 1,
    val_fraction: float = 0.2,
    columns: Mapping[str, str] | None = None,
    partition: PartitionFunction | None = None,
    max_pixels: int | None = None,
    resize: int | None = None,
    skip_bad: bool = False,
    check: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> DatasetInfo:
    """Write ``source`` as MDS shards to ``out``, unless they exist. Processes with the same ``out`` take turns.

    Args:
        source: A file or folder of one of the forms in `sources.FORMS`, or the name of built-in data.
        out: A folder that is missing, empty, or completely or partly prepared from the same source.
        jobs: Number of processes, which does not affect the result.
        val_fraction: Share of each class to hold out if the source has no validation split.
        columns: Names of the columns that hold the ``image`` and the ``label``, where the usual names do not fit.
        partition: Divides the training samples into partitions, each of which is also written as a data set.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit, 179 million.
        resize: Shorter side in pixels to which larger images are resized. None: images are stored as they are.
        skip_bad: Whether to leave out images that cannot be read.
        check: Whether to compare the contents of all files with what was prepared before, even if their sizes and
            modification times are the same.
        on_progress: Called with the number of samples done and the total.
        report: Called with each line of the summary, or with each image that cannot be read.

    Returns:
        The description of the data set.

    Raises:
        ConfigError: If ``out`` is inside the source, or ``jobs``, ``val_fraction`` or ``columns`` is invalid.
        MissingDependencyError: If the form needs a package that is not installed.
        DataError: If the source does not exist, images cannot be read, or ``out`` contains other files.
        SystemResourceError: If a file cannot be written, or a process was killed.

    Example:
        >>> bi.prepare_dataset("photos", Path("data/photos"), jobs=8)
    """
    check_integer("jobs", jobs)
    if resize is not None:
        check_integer("resize", resize)
    if not 0 <= val_fraction < 1:  # refuses nan as well
        raise ConfigError(f"val_fraction = {val_fraction}: expected a number from 0 to less than 1")
    out = Path(os.path.abspath(out))
    if source not in EMBEDDED:
        refuse_inside(out, source)
    nothing = PrepareOptions()
    options = PrepareOptions(
        jobs, max_pixels, resize, skip_bad, check, on_progress or nothing.on_progress, report or nothing.report
    )
    with preparing(source, out):
        return _prepare(read_source(source, val_fraction, columns), out, partition, options)


def _prepare(source: Source, out: Path, partition: PartitionFunction | None, options: PrepareOptions) -> DatasetInfo:
    parts = partition(source.splits["train"]) if partition else None
    identity: dict[str, Any] = {"kind": source.kind}
    if options.resize is not None:
        identity["resize"] = options.resize
    if parts is not None:
        if not all(parts):
            raise DataError(f"part {parts.index([])} would have no samples; use fewer parts")
        names = [sorted(sample.name for sample in part) for part in parts]
        identity["parts"] = hashlib.sha256(repr(names).encode()).hexdigest()
    if (out / DESCRIPTION).exists():
        info = _reopen(source, out, identity, options)
        (out / UNFINISHED).unlink(missing_ok=True)
        return info
    begin_folder(out, source.kind, source.folder)
    with unpacked(source, out, options.report) as readable:
        return _write(readable, out, parts and _same_samples(parts, readable), identity, options)


def _write(
    source: Source, out: Path, parts: list[list[Sample]] | None, identity: dict[str, Any], options: PrepareOptions
) -> DatasetInfo:
    """Write the chunks and the descriptions of the data."""
    whole = {"train": parts or [source.splits["train"]], "val": [source.splits["val"]]}
    chunks = {split: _make_chunks(out / split, groups, options) for split, groups in whole.items()}
    _write_chunks([*chunks["train"], *chunks["val"]], out, options)
    records = [(split, chunk, _read_own_record(chunk)) for split, own in chunks.items() for chunk in own]
    _report_unreadable(records, out, options)
    summary = summarize_source(source, records)
    for name, count in zip(source.classes, summary["counts"]["train"], strict=True):
        if not count:
            raise DataError(f"class {name} has no readable training image; add some, or remove its folder")
    contents = {sample.name: hash for _, chunk, record in records for sample, hash in _contents(chunk, record)}
    identity |= {
        "fingerprint": source.fingerprint,
        "contents": source.content_hash(contents[s.name] for samples in source.splits.values() for s in samples),
    }
    schema = labelled_image_schema(source.classes, options.max_pixels, options.resize)
    size = sum(summary["counts"]["train"])
    write_descriptions(out, schema, chunks, {**identity, "summary": summary}, len(parts or ()), size)
    info = open_dataset(out)
    write_names(info, [name for split, chunk, record in records if split == "val" for name in _readable(chunk, record)])
    shutil.rmtree(out / RECORDS)
    (out / UNFINISHED).unlink()
    _report_summary(summary, source.classes, options)
    return info


def _same_samples(parts: list[list[Sample]], source: Source) -> list[list[Sample]]:
    """Return the samples of a source that have the names of those in partitions."""
    by_name = {sample.name: sample for sample in source.splits["train"]}
    return [[by_name[sample.name] for sample in part] for part in parts]


def _contents(chunk: Chunk, record: ChunkRecord) -> Iterator[tuple[Sample, str]]:
    return zip(chunk.samples, record.contents, strict=True)


def _readable(chunk: Chunk, record: ChunkRecord) -> Iterator[str]:
    return (sample.name for sample in chunk.samples if sample.name not in record.unreadable)


def _read_own_record(chunk: Chunk) -> ChunkRecord:
    record = read_record(chunk)
    if record is None:
        raise DataError(f"{quote_path(chunk.folder)} was changed by another process; run the same command again")
    return record


def _reopen(source: Source, out: Path, identity: dict[str, Any], options: PrepareOptions) -> DatasetInfo:
    """Return the data set in ``out`` if it was prepared from the same source.

    Raises:
        DataError: If it was prepared from another source, with other partitions, or from files that changed since.
    """
    stored = read_json(out / DESCRIPTION).get("source")
    if not isinstance(stored, dict) or any(stored.get(key) != identity.get(key) for key in ("kind", "parts", "resize")):
        raise DataError(
            f"{quote_path(out)} holds data from another source, with other parts or of another size; delete it or use"
            " another folder"
        )
    if options.check or stored.get("fingerprint") != source.fingerprint:
        with unpacked(source, out, options.report) as readable, ThreadPoolExecutor(options.jobs) as pool:
            samples = [sample for split in readable.splits.values() for sample in split]
            contents = source.content_hash(pool.map(lambda sample: sample.content, samples))
        if contents != stored.get("contents"):
            raise DataError(
                f"{quote_path(out)} holds data from another source: files were added, removed or changed since, or"
                " --val-fraction differs; delete it or use another folder"
            )
    info = open_dataset(out)
    if not has_names(info):  # prepared by an earlier version
        chunks = _make_chunks(out / "val", [source.splits["val"]], options)
        names = [sample.name for chunk in chunks for sample in chunk.samples]
        if len(names) == info.samples["val"]:
            with suppress(OSError):  # the data may be read-only
                write_names(info, names)
    _report_summary(stored.get("summary"), source.classes, options)
    return info


def _make_chunks(folder: Path, parts: list[list[Sample]], options: PrepareOptions) -> list[Chunk]:
    """Return the chunks of a split; each contains samples of one partition, in the order of the hashes of their names.

    The chunk of a sample depends on its name and on the number of chunks, not on the other samples. It uses other bytes
    of the hash than the order, because a split that was held out has only the last samples in this order. Samples that
    are read together (`Sample.block`) are in one chunk unless they are too many, one after another.
    """
    chunks: list[Chunk] = []
    first = 0
    for part, samples in enumerate(parts):
        count = math.ceil(len(samples) / CHUNK_SAMPLES)
        blocks = Counter(sample.block[0] for sample in samples if sample.block)
        whole = {block for block, size in blocks.items() if size <= MAX_BLOCK_CHUNKS * CHUNK_SAMPLES}
        groups: list[list[Sample]] = [[] for _ in range(count)]
        for sample in sorted(samples, key=_reading_order):
            name = sample.block[0] if sample.block and sample.block[0] in whole else sample.name
            groups[int.from_bytes(hash_name(name)[8:16], "big") * count >> 64].append(sample)
        chunks += [
            Chunk(folder / f"{first + n:05}", group, part, options.max_pixels, options.resize)
            for n, group in enumerate(groups)
            if group
        ]
        first += count
    return chunks


def _reading_order(sample: Sample) -> tuple[bytes, int]:
    name, position = sample.block or (sample.name, 0)
    return hash_name(name), position


def _write_chunks(chunks: list[Chunk], out: Path, options: PrepareOptions) -> None:
    """Write the chunks that are missing, or whose files have changed."""
    folders = {chunk.folder for chunk in chunks}
    for split in {folder.parent for folder in folders}:
        split.mkdir(exist_ok=True)
        for folder in split.iterdir():
            if folder not in folders and folder.is_dir():  # of a source that had more samples
                shutil.rmtree(folder)
    (out / RECORDS).mkdir(exist_ok=True)
    missing = [chunk for chunk in chunks if options.check or not is_unchanged(chunk)]
    total = sum(len(chunk.samples) for chunk in chunks)
    done = total - sum(len(chunk.samples) for chunk in missing)
    options.on_progress(done, total)
    with run_in_processes(write_samples, missing, options.jobs, "images") as written:
        for count in written:
            done += count
            options.on_progress(done, total)


def _report_unreadable(records: list[tuple[str, Chunk, ChunkRecord]], out: Path, options: PrepareOptions) -> None:
    """List the images that cannot be read, also in a file.

    Raises:
        DataError: If there are any, unless they are to be left out.
    """
    paths = {sample.name: sample.image for _, chunk, _ in records for sample in chunk.samples}
    bad = [(str(paths[name]), why) for _, _, record in records for name, why in record.unreadable.items()]
    report_unreadable(bad, len(paths), "image", out, options.report, skip=options.skip_bad)


def _report_summary(summary: Any, classes: list[str], options: PrepareOptions) -> None:
    for line in summary_lines(summary, classes):
        options.report(line.encode(errors="backslashreplace").decode())


# ------------------------------------------------------------------------------------------------ one chunk


def write_samples(chunk: Chunk) -> int:
    """Write one chunk atomically, unless it was made of the same contents, and return the number of its samples."""
    if has_same_contents(chunk):
        return len(chunk.samples)
    chunk.record_file.unlink(missing_ok=True)
    if chunk.folder.exists():
        shutil.rmtree(chunk.folder)
    record = ChunkRecord(chunk.key, chunk.stamps)
    write_chunk(chunk.folder, LABELLED_IMAGE_COLUMNS, _read_samples(chunk, record))
    record.write(chunk)
    return len(chunk.samples)


def _read_samples(chunk: Chunk, record: ChunkRecord) -> Iterator[dict[str, Any]]:
    """Yield the records of the samples that can be read, and complete the record of the chunk."""
    for sample in chunk.samples:
        if isinstance(sample.image, np.ndarray):
            record.contents.append(sample.content)
            image = Image.fromarray(sample.image)
            yield {"image": _resized(image, chunk) or encode_png(image), "label": sample.label}
            continue
        content = ""
        try:
            data = sample.read()
            content = hashlib.sha256(data).hexdigest()
            image = decode_image(data, max_pixels=chunk.max_pixels)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            record.unreadable[sample.name] = error.strerror or type(error).__name__
        except ValueError as error:
            record.unreadable[sample.name] = str(error)
        else:
            record.turned += exif_orientation(image) != 1
            yield {"image": _resized(image, chunk) or data, "label": sample.label}
        record.contents.append(content)


def _resized(image: Image.Image, chunk: Chunk) -> bytes | None:
    """Return an image as a smaller file; None if it is to be stored as it is."""
    if chunk.resize is None or min(image.size) <= chunk.resize:
        return None
    return encode_resized(image.convert("RGB"), chunk.resize, exif_orientation(image))
