"""Read the samples of a source: a folder of images, a CIFAR archive, scikit-learn's digits, or generated images."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .images import SUFFIXES
from .splits import sort_by_name_hash, split_train_val

EMBEDDED = ("digits", "digits-dev", "made-up")
VALIDATION_FOLDERS = ("val", "validation", "test")
CIFAR = {  # files of the training split, of the test split and of the class names; key of the labels
    "cifar-10": ([f"data_batch_{n}" for n in range(1, 6)], ["test_batch"], "batches.meta", "label"),
    "cifar-100": (["train"], ["test"], "meta", "fine_label"),
}


class Sample(NamedTuple):
    """An image with its label.

    Attributes:
        name: Unique name in the source.
        label: Index of the class.
        image: Path of an image file, or pixels [H, W] or [H, W, 3] uint8.
    """

    name: str
    label: int
    image: str | np.ndarray


@dataclass(frozen=True)
class Source:
    """A source with the list of its samples. Image files are not read yet.

    Attributes:
        kind: The kind of source, such as ``images`` or ``cifar-10``.
        classes: Names of the classes.
        splits: The samples of ``"train"`` and ``"val"``.
    """

    kind: str
    classes: list[str]
    splits: dict[str, list[Sample]]

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the source: of names, labels, and file sizes or pixels."""
        digest = hashlib.sha256(repr((self.kind, self.classes)).encode())
        for split, samples in self.splits.items():
            for name, label, image in samples:
                content = os.stat(image).st_size if isinstance(image, str) else image.tobytes()
                digest.update(repr((split, name, label, content)).encode())
        return digest.hexdigest()


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
        return _read_cifar_folder(path) or _read_image_tree(path, val_fraction)
    known = "a folder of images by class, a CIFAR-10 or CIFAR-100 python archive, or " + " or ".join(EMBEDDED)
    if path.exists():
        raise DataError(f"{source}: unknown kind of source; expected {known}")
    raise DataError(f"no such source: {source}; expected {known}")


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


# ------------------------------------------------------------------------------------------------ image trees


def _read_image_tree(root: Path, val_fraction: float) -> Source:
    """Return the images of a folder that has one folder per class, or such folders for each split."""
    folders = _list_folders(root)
    held_out = next((name for name in VALIDATION_FOLDERS if name in folders), None)
    if "train" in folders and held_out:
        parts = {"train": root / "train", "val": root / held_out}
    else:
        parts = {"train": root / "train" if folders == ["train"] else root}
    classes = _list_folders(parts["train"])
    if not classes:
        raise DataError(
            f"no images in {root}: expected {root}/CLASS/*.jpg, or {root}/train/CLASS/* and {root}/val/CLASS/*"
        )
    splits = {split: _list_images(root, folder, classes) for split, folder in parts.items()}
    for label, name in enumerate(classes):
        if not any(sample.label == label for sample in splits["train"]):
            raise DataError(f"no images in {parts['train'] / name}; add images or remove the folder")
    if "val" not in splits:
        splits = split_train_val(sort_by_name_hash(splits["train"]), val_fraction)
    if not splits["val"]:
        raise DataError(f"no images in {parts['val']}; add images or remove the folder")
    return Source("images", classes, splits)


def _list_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(root: Path, folder: Path, classes: list[str]) -> list[Sample]:
    unknown = sorted(set(_list_folders(folder)) - set(classes))
    if unknown:
        raise DataError(f"{folder / unknown[0]}: this class has no training images; remove the folder")
    samples = []
    for label, name in enumerate(classes):
        files = []
        for where, _, names in os.walk(folder / name, followlinks=True):
            images = [file for file in names if file.lower().endswith(SUFFIXES) and not file.startswith(".")]
            files += [os.path.join(where, file) for file in images]
        samples += [Sample(os.path.relpath(file, root), label, file) for file in sorted(files)]
    return samples


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
