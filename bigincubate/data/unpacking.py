"""Unpack a compressed archive next to the data that is prepared from it, because it cannot be read at an offset."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import SystemResourceError
from ..files import quote_path
from .samples import Sample, Source
from .sources.archives import DAMAGED, damaged_archive, open_compressed
from .sources.slices import FileSlice

UNPACKED = ".unpacked"  # folder in that of the data; removed when the data is complete
COPY_BYTES = 2**20


@contextmanager
def unpacked(source: Source, out: Path, report: Callable[[str], None]) -> Iterator[Source]:
    """Yield a source whose images can be read at their offsets: the same one unless it is a compressed archive.

    The unpacked archive is kept if an error occurs, so that running the same command again does not unpack it again.

    Args:
        source: The source.
        out: The folder of the data.
        report: Called with a line that says what is unpacked.

    Raises:
        DataError: If the archive is damaged.
        SystemResourceError: If the disk has too little space.
    """
    if source.compressed is None:
        yield source
        return
    archive, folder = Path(source.compressed), out / UNPACKED
    status = archive.stat()
    file = folder / f"{status.st_size}-{status.st_mtime_ns}.tar"  # of this version of the archive
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        size = max(
            sample.image.offset + sample.image.size
            for samples in source.splits.values()
            for sample in samples
            if isinstance(sample.image, FileSlice)
        )
        report(
            f"{archive.name} is compressed, so it is read twice, and takes {size / 1e9:,.3f} GB in {quote_path(folder)}"
            " in the meantime"
        )
        if shutil.disk_usage(folder).free < size:
            raise SystemResourceError(
                f"{quote_path(archive)} is compressed and unpacks to {size / 1e9:,.3f} GB, for which {quote_path(out)}"
                " has no space; make space, or decompress it elsewhere and prepare the result"
            )
        _unpack(archive, file, size)
    splits = {split: [_relocate(sample, str(file)) for sample in samples] for split, samples in source.splits.items()}
    yield replace(source, splits=splits)
    shutil.rmtree(folder)


def _unpack(archive: Path, file: Path, size: int) -> None:
    """Write the first ``size`` bytes that an archive unpacks to."""
    temporary = file.with_suffix(".part")
    try:
        with open_compressed(archive) as packed, temporary.open("wb") as unpacked_file:
            while size:
                data = packed.read(min(size, COPY_BYTES))
                if not data:
                    raise ValueError("it has become shorter")
                size -= unpacked_file.write(data)
    except DAMAGED as error:
        raise damaged_archive(archive, str(error)) from None
    os.replace(temporary, file)


def _relocate(sample: Sample, file: str) -> Sample:
    assert isinstance(sample.image, FileSlice)
    return sample._replace(image=sample.image._replace(file=file, shown=sample.image.file))
