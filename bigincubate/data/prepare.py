"""Prepare a data set: write the samples of a source as MDS shards.

Samples are written in chunks (:mod:`.chunks`), so that an interrupted run can resume. A chunk contains samples of only
one partition (:mod:`.partitions`), so that partitions can share the shards of the whole data set.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, SystemResourceError
from ..files import fsync_path
from .chunks import write_chunk, write_description
from .dataset import DESCRIPTION, DatasetInfo, open_dataset, read_json, write_json
from .file_locks import folder_lock
from .images import LABELLED_IMAGE_COLUMNS, decode_image, encode_png, labelled_image_schema
from .partitions import PartitionFunction, partition_path
from .sources import Sample, Source, read_source
from .splits import sort_by_name_hash

CHUNK_SAMPLES = 2048
UNFINISHED = ".preparing.json"

logger = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Samples that are written together.

    Attributes:
        folder: The folder of the shards.
        samples: The samples.
        part: The partition they belong to.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit.
    """

    folder: Path
    samples: list[Sample]
    part: int = 0
    max_pixels: int | None = None


def prepare_dataset(
    source: str,
    out: Path,
    *,
    jobs: int = 1,
    val_fraction: float = 0.2,
    partition: PartitionFunction | None = None,
    max_pixels: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetInfo:
    """Write ``source`` as MDS shards to ``out``, unless they exist. Processes with the same ``out`` take turns.

    Args:
        source: A folder of images by class, a CIFAR python archive (packed or unpacked), or the name of built-in data.
        out: A folder that is missing, empty, or completely or partly prepared from the same source.
        jobs: Number of processes, which does not affect the result.
        val_fraction: Share of each class to hold out if a folder of images has no validation split.
        partition: Divides the training samples into partitions, each of which is also written as a data set.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit, 179 million.
        on_progress: Called with the number of samples done and the total.

    Returns:
        The description of the data set.

    Raises:
        DataError: If the source does not exist, an image cannot be read, or ``out`` contains other files.
        SystemResourceError: If a file cannot be written, or a process was killed.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            found = read_source(source, val_fraction)
            return _prepare(found, out, jobs, partition, max_pixels, on_progress or (lambda *_: None))
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise SystemResourceError(
            f"cannot prepare {source}: {what}; fix the problem, then run the same command again to resume"
        ) from None
    except BrokenProcessPool:
        raise SystemResourceError(
            f"a process preparing {source} was killed (out of memory?); run the same command again to resume"
        ) from None


def _prepare(
    source: Source,
    out: Path,
    jobs: int,
    partition: PartitionFunction | None,
    max_pixels: int | None,
    on_progress: Callable[[int, int], None],
) -> DatasetInfo:
    parts = partition(source.splits["train"]) if partition else None
    schema = labelled_image_schema(source.classes, max_pixels)
    identity = {"kind": source.kind, "fingerprint": source.fingerprint}
    if parts is not None:
        if not all(parts):
            raise DataError(f"part {parts.index([])} would have no samples; use fewer parts")
        names = [sorted(sample.name for sample in part) for part in parts]
        identity["parts"] = hashlib.sha256(repr(names).encode()).hexdigest()
    for mark in (DESCRIPTION, UNFINISHED):
        if (out / mark).exists() and read_json(out / mark).get("source") != identity:
            raise DataError(
                f"{out} holds data from another source or with other parts; delete it or use another folder"
            )
    if (out / DESCRIPTION).exists():
        (out / UNFINISHED).unlink(missing_ok=True)
        return open_dataset(out)
    if not (out / UNFINISHED).exists() and out.exists() and any(out.iterdir()):
        raise DataError(f"{out} holds other files; use a new or empty folder")
    out.mkdir(exist_ok=True)
    write_json(out / UNFINISHED, {"source": identity})
    for leftover in (*out.glob(".tmp-*"), *out.glob("parts")):
        # moved first, so that a process of a killed preparation that still writes it cannot complete it meanwhile
        shutil.rmtree(leftover.rename(out / f".tmp-removed-{secrets.token_hex(4)}"))

    train, val = (
        _make_chunks(out / "train", parts or [source.splits["train"]], max_pixels),
        _make_chunks(out / "val", [source.splits["val"]], max_pixels),
    )
    chunks = [*train, *val]
    total = sum(len(chunk.samples) for chunk in chunks)
    done = sum(len(chunk.samples) for chunk in chunks if chunk.folder.exists())
    on_progress(done, total)
    with _write_all([chunk for chunk in chunks if not chunk.folder.exists()], jobs) as written:
        for count in written:
            done += count
            on_progress(done, total)

    digests, size, linked = [], len(source.splits["train"]), True
    for number in range(len(parts or [])):
        folder = Path(partition_path(out, number))
        own = [chunk for chunk in train if chunk.part == number]
        for split, split_chunks in (("train", own), ("val", val)):
            for chunk in split_chunks:
                linked &= _link_folder(chunk.folder, folder / split / chunk.folder.name)
        folders = {"train": [chunk.folder for chunk in own], "val": [chunk.folder for chunk in val]}
        digests.append(write_description(folder, schema, folders, identity, {"part": number, "of": size}))
    if parts:
        fsync_path(out / "parts")
    if not linked:
        logger.warning(
            "%s: the file system has no hard links; the partitions are copies and take as much space again", out
        )
    folders = {"train": [chunk.folder for chunk in train], "val": [chunk.folder for chunk in val]}
    write_description(out, schema, folders, identity, {"parts": digests} if parts else {})
    (out / UNFINISHED).unlink()
    return open_dataset(out)


def _make_chunks(folder: Path, parts: list[list[Sample]], max_pixels: int | None) -> list[Chunk]:
    """Return the chunks of a split, numbered consecutively; each contains samples of one partition."""
    folder.mkdir(exist_ok=True)
    groups = [
        (part, ordered[begin : begin + CHUNK_SAMPLES])
        for part, samples in enumerate(parts)
        for ordered in [sort_by_name_hash(samples)]
        for begin in range(0, len(ordered), CHUNK_SAMPLES)
    ]
    return [Chunk(folder / f"{number:05}", group, part, max_pixels) for number, (part, group) in enumerate(groups)]


def _link_folder(folder: Path, other: Path) -> bool:
    """Hard-link the files of a folder into another one, or copy them if the file system has no hard links.

    Returns:
        Whether all files are links.
    """
    other.mkdir(parents=True)
    linked = True
    for file in folder.iterdir():
        try:
            os.link(file, other / file.name)
        except OSError:
            linked = False
            shutil.copyfile(file, other / file.name)
            fsync_path(other / file.name)
    fsync_path(other)
    return linked


# ------------------------------------------------------------------------------------------------ one chunk


def write_samples(chunk: Chunk) -> int:
    """Write one chunk atomically and return the number of its samples."""
    records = ({"image": _image_bytes(sample, chunk.max_pixels), "label": sample.label} for sample in chunk.samples)
    write_chunk(chunk.folder, LABELLED_IMAGE_COLUMNS, records)
    return len(chunk.samples)


def _image_bytes(sample: Sample, max_pixels: int | None) -> bytes:
    """Return the image file of a sample, after checking that it can be decoded."""
    if not isinstance(sample.image, str):
        from PIL import Image

        return encode_png(Image.fromarray(sample.image))
    data = Path(sample.image).read_bytes()
    try:
        decode_image(data, max_pixels=max_pixels)
    except ValueError as error:
        raise DataError(f"{sample.image} is not a readable image ({error}); repair or remove it") from None
    return data


@contextmanager
def _write_all(chunks: list[Chunk], jobs: int) -> Iterator[Iterator[int]]:
    """Write chunks in this process, or in ``jobs`` other processes. Yields an iterator over the sizes of the chunks."""
    if jobs <= 1 or len(chunks) <= 1:
        yield map(write_samples, chunks)
        return
    import streaming  # noqa: F401  import it once, before the processes are forked

    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_exit_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        futures = [pool.submit(write_samples, chunk) for chunk in chunks]
        yield (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process has ended, even by SIGKILL, because this process also holds the parent's lock."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
