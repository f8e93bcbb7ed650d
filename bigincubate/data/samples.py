"""Samples of a source, before they are prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class StoredImage(Protocol):
    """An image file inside another file. It can be pickled, and ``str`` says where it is.

    Preparation lists all images before it reads the first one, so this holds only what is needed to read it.
    """

    def read(self, limit: int | None = None) -> bytes:
        """Return the bytes of the image file, or only the first ``limit`` of them.

        Raises:
            ValueError: If they are damaged.
            OSError: If the file that contains them cannot be read.
        """


class Sample(NamedTuple):
    """An image with its label.

    Attributes:
        name: Unique name in the source.
        label: Index of the class.
        image: Path of an image file, an image file inside another file, or pixels [H, W] or [H, W, 3] uint8.
        stamp: Size in bytes and modification time in nanoseconds of the file; None for pixels.
        block: If an image cannot be read without those before it: the name of the part of a file in which it lies, and
            its position there. Preparation then reads the images of a block together, in order.
    """

    name: str
    label: int
    image: str | StoredImage | np.ndarray
    stamp: tuple[int, int] | None = None
    block: tuple[str, int] | None = None

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is stored inside another file that is damaged.
        """
        assert not isinstance(self.image, np.ndarray)
        return Path(self.image).read_bytes() if isinstance(self.image, str) else self.image.read()

    @property
    def content(self) -> str:
        """Return the SHA-256 of the file or the pixels; an empty string if the file cannot be read."""
        if isinstance(self.image, np.ndarray):
            return hashlib.sha256(repr(self.image.shape).encode() + self.image.tobytes()).hexdigest()
        try:
            return hashlib.sha256(self.read()).hexdigest()
        except (OSError, ValueError):
            return ""


@dataclass(frozen=True)
class Source:
    """A source with the list of its samples. Image files are not read yet.

    Attributes:
        kind: The kind of source, such as ``images`` or ``cifar-10``.
        classes: Names of the classes.
        splits: The samples of ``"train"`` and ``"val"``.
        folder: The absolute path of a folder of images; otherwise None.
        notes: What the description of the data says about how the source was read (plain JSON values).
        compressed: The path of the archive that must be unpacked before its images can be read; otherwise None.
    """

    kind: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    folder: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    compressed: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of names, labels, and sizes and modification times of files, or pixels."""
        return self._hash(sample.stamp or sample.content for samples in self.splits.values() for sample in samples)

    def content_hash(self, contents: Iterable[str]) -> str:
        """Return a SHA-256 of names, labels and contents.

        Args:
            contents: The content hash of each sample, in the order of ``splits``.
        """
        return self._hash(contents)

    def _hash(self, values: Iterable[Any]) -> str:
        digest = hashlib.sha256(repr((self.kind, self.classes)).encode())
        rows = [(split, sample.name, sample.label) for split, samples in self.splits.items() for sample in samples]
        for row in sorted((*row, value) for row, value in zip(rows, values, strict=True)):
            digest.update(repr(row).encode())
        return digest.hexdigest()
