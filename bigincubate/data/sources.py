"""Read the samples of a source: a folder of images, a CIFAR archive, scikit-learn's digits, or generated images."""

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

from ..errors import DataError
from ..files import quote_path
from .image_files import UNREAD_FORMATS
from .image_folders import read_image_folder
from .samples import Sample, Source
from .splits import sort_by_name_hash, split_train_val

EMBEDDED = ("digits", "digits-dev", "made-up")
CIFAR = {  # files of the training split, of the test split and of the class names; key of the labels
    "cifar-10": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label"),
    "cifar-100": (["train"], ["test"], "meta", "fine_label"),
}


def read_source(source: str, val_fraction: float) -> Source:
    """Detect the kind of a source and list its samples.

    Args:
        source: A folder, an archive, or the name of built-in data.
        val_fraction: Share of each class to hold out if a folder of images has no validation split.

    Raises:
        DataError: If the source is missing, empty, of an unknown kind, or damaged.
    """
    if source == "made-up":
        return _generate_images()
    if source in EMBEDDED:
        return _read_digits(development=source == "digits-dev")
    path = Path(source)
    if path.is_file() and tarfile.is_tarfile(path):
        return _read_cifar_archive(path)
    if path.is_dir():
        return _read_cifar_folder(path) or read_image_folder(path, val_fraction)
    known = "a folder of images by class, a CIFAR-10 or CIFAR-100 python archive, or " + " or ".join(EMBEDDED)
    if not os.path.lexists(path):
        raise DataError(f"no such source: {quote_path(path)}; expected {known}")
    if path.suffix.lower() in UNREAD_FORMATS:
        action = UNREAD_FORMATS[path.suffix.lower()]
        raise DataError(f"{quote_path(path)}: {path.suffix} files are not read yet: {action}, in one folder per class")
    raise DataError(f"{quote_path(path)}: unknown kind of source; expected {known}")


# ------------------------------------------------------------------------------------------------ digits


def _read_digits(*, development: bool) -> Source:
    """Return scikit-learn's digits: 1,797 images of 8x8 pixels and 17 gray levels; 20% of each digit is held out.

    The development set contains only the training samples of the full set, of which 20% are held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    samples = [Sample(f"{n}", int(label), pixels[n]) for n, label in enumerate(data.target)]
    splits = split_train_val(sort_by_name_hash(samples), 0.2)
    if development:
        splits = split_train_val(splits["train"], 0.2)
    return Source("digits-dev" if development else "digits", [str(n) for n in range(10)], splits)


def _generate_images() -> Source:
    """Return colored noise: ten classes of different colors, with 32 images of 40x40 pixels each; 20% is held out."""
    random = np.random.RandomState(0)  # the only generator whose output numpy guarantees never to change
    colors, noise = random.randint(0, 128, (10, 1, 1, 3)), random.randint(0, 128, (320, 40, 40, 3))
    samples = [Sample(f"{n}", n % 10, (noise[n] + colors[n % 10]).astype(np.uint8)) for n in range(320)]
    return Source("made-up", [str(n) for n in range(10)], split_train_val(sort_by_name_hash(samples), 0.2))


# ------------------------------------------------------------------------------------------------ CIFAR


def _read_cifar_archive(archive: Path) -> Source:
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


def _read_cifar_folder(root: Path) -> Source | None:
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
