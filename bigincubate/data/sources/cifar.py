"""Read the python archives of CIFAR-10 and CIFAR-100, packed or unpacked."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ...errors import DataError
from ..samples import Sample, Source
from .archives import DAMAGED, damaged_archive
from .request import SourceRequest

CIFAR = {  # files of the training split, of the test split and of the class names; key of the labels
    "cifar-10": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label"),
    "cifar-100": (["train"], ["test"], "meta", "fine_label"),
}


def read_cifar(request: SourceRequest) -> Source | None:
    """Return the images of a CIFAR archive, packed or unpacked; None for anything else.

    Raises:
        DataError: If it is damaged.
    """
    path = request.path
    if path.is_dir():
        files = [entry.name for entry in path.iterdir() if entry.is_file()]
        return _read_cifar(files, lambda name: (path / name).read_bytes(), str(path))
    archive = request.archive
    if archive is None or archive.form != "tar":
        return None
    names = {os.path.basename(member.name) for member in archive.members}
    if not any(names >= {*train, *test, meta} for train, test, meta, _ in CIFAR.values()):
        return None
    try:
        with tarfile.open(path) as tar:
            by_name = {os.path.basename(member.name): member for member in tar if member.isfile()}

            def read(name: str) -> bytes:
                file = tar.extractfile(by_name[name])
                assert file is not None  # contains only regular files
                return file.read()

            return _read_cifar(by_name, read, str(path))
    except DAMAGED as error:
        raise damaged_archive(path, str(error)) from None


def _read_cifar(names: Iterable[str], read: Callable[[str], bytes], where: str) -> Source | None:
    """Return the images of a CIFAR archive; None if a file is missing."""
    names = set(names)
    for kind, (train, test, meta, label) in CIFAR.items():
        if not names >= {*train, *test, meta}:
            continue
        try:
            labels = safe_unpickle(read(meta))[f"{label}_names".encode()]
            parts = {"train": train, "val": test}
            splits = {
                split: [s for name in files for s in _cifar_samples(name, safe_unpickle(read(name)), f"{label}s")]
                for split, files in parts.items()
            }
            return Source(kind, [name.decode() for name in labels], splits)
        except (pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, EOFError) as error:
            raise DataError(f"{where}: not an original {kind} archive; refused: {error}") from None
    return None


def _cifar_samples(file: str, batch: dict[bytes, Any], key: str) -> list[Sample]:
    labels = batch[key.encode()] if key.encode() in batch else batch[b"labels"]
    pixels = batch[b"data"].reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels of dtype {pixels.dtype}, expected uint8")
    return [Sample(f"{file}/{n}", int(label), pixels[n]) for n, label in enumerate(labels)]


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers, and refuses everything else."""

    allowed = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),  # Python 3 writes bytes this way in older pickle protocols
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"the pickle refers to {module}.{name}")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined, unused-ignore]

            return _reconstruct
        return super().find_class(module, name)


def safe_unpickle(data: bytes) -> Any:
    """Read an untrusted pickle. Strings of Python 2 are returned as bytes.

    Raises:
        pickle.UnpicklingError: If the pickle contains anything but arrays and plain containers.
    """
    return _RestrictedUnpickler(io.BytesIO(data), encoding="bytes").load()
