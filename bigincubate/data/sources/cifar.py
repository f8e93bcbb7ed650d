"""Read the python archives of CIFAR-10 and CIFAR-100, packed or unpacked."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ..samples import Sample, Source

CIFAR = {  # files of the training split, of the test split and of the class names; key of the labels
    "cifar-10": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label"),
    "cifar-100": (["train"], ["test"], "meta", "fine_label"),
}


def read_cifar_archive(archive: Path) -> Source:
    """Return the images of a packed CIFAR archive.

    Raises:
        DataError: If it is damaged, or is another archive.
    """
    try:
        with tarfile.open(archive) as tar:
            members = {os.path.basename(member.name): member for member in tar if member.isfile()}

            def read(name: str) -> bytes:
                file = tar.extractfile(members[name])
                assert file is not None  # members contains only regular files
                return file.read()

            source = _read_cifar(members, read, str(archive))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is damaged: {error}; download it again") from None
    if source is None:
        raise DataError(f"{archive}: not a CIFAR-10 or CIFAR-100 python archive; unpack it and try again")
    return source


def read_cifar_folder(root: Path) -> Source | None:
    """Return the images of an unpacked CIFAR archive; None if the folder holds something else."""
    names = [entry.name for entry in root.iterdir() if entry.is_file()]
    return _read_cifar(names, lambda name: (root / name).read_bytes(), str(root))


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
