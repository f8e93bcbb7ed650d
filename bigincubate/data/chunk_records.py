"""What is known of a chunk while data is prepared: which samples it was made of, and which of them cannot be read.

The record of a chunk is written after its shards, so a chunk without a record is written again. All records are deleted
when the data is complete.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..files import read_json, write_json
from .samples import Sample

RECORDS = ".chunks"


class Chunk(NamedTuple):
    """Samples that are written together.

    Attributes:
        folder: The folder of the shards.
        samples: The samples.
        part: The partition they belong to.
        max_pixels: Maximum number of pixels of an image. None: Pillow's limit.
        resize: Shorter side to which larger images are resized. None: images are stored as they are.
    """

    folder: Path
    samples: list[Sample]
    part: int = 0
    max_pixels: int | None = None
    resize: int | None = None

    @property
    def record_file(self) -> Path:
        """Return the file of the chunk's record."""
        split = self.folder.parent
        return split.parent / RECORDS / f"{split.name}-{self.folder.name}.json"

    @property
    def key(self) -> str:
        """Return a SHA-256 of the names and labels of the samples and of what else decides what is written."""
        rows = [(sample.name, sample.label) for sample in self.samples]
        return hashlib.sha256(repr((rows, self.max_pixels, self.resize)).encode()).hexdigest()

    @property
    def stamps(self) -> str:
        """Return a SHA-256 of the sizes and modification times of the files, or of the pixels."""
        return hashlib.sha256(repr([sample.stamp or sample.content for sample in self.samples]).encode()).hexdigest()


@dataclass
class ChunkRecord:
    """What is known of a chunk that was written.

    Attributes:
        key: See `Chunk`.
        stamps: See `Chunk`.
        contents: The content hash of each sample, in order.
        unreadable: Reason by name for the samples that cannot be read, which were left out.
        turned: Number of images whose EXIF orientation is not upright.
    """

    key: str
    stamps: str
    contents: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    turned: int = 0

    def write(self, chunk: Chunk) -> None:
        """Write the record of a chunk whose shards are complete."""
        write_json(chunk.record_file, asdict(self))


def read_record(chunk: Chunk) -> ChunkRecord | None:
    """Return the record of a chunk; None if the chunk is missing, incomplete, or was made of other samples."""
    value = read_json(chunk.record_file) if chunk.folder.exists() else None
    try:
        record = ChunkRecord(**value) if value else None
    except TypeError:  # damaged
        return None
    return record if record and record.key == chunk.key and len(record.contents) == len(chunk.samples) else None


def is_unchanged(chunk: Chunk) -> bool:
    """Return whether a chunk was made of files with the same sizes and modification times, all of them readable."""
    record = read_record(chunk)
    return record is not None and not record.unreadable and record.stamps == chunk.stamps


def has_same_contents(chunk: Chunk) -> bool:
    """Return whether a chunk was made of the same contents; this reads all its files."""
    record = read_record(chunk)
    return record is not None and record.contents == [sample.content for sample in chunk.samples]
