"""What the untrusted files of all kinds share: payloads, nesting, committed manifests."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigincubate.errors import BigincubateError

# name, function that writes the file and returns what reads it, expected error; None: harmless, reading may succeed
Kind = tuple[str, Callable[[Any], Any], type[BigincubateError] | None]
NOWHERE, DEEP, HASH = Path("/nowhere"), 100_000, "0" * 64


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def deep(opening: str = "[", closing: str = "]") -> bytes:
    return (opening * DEEP + closing * DEEP).encode()


def sealed(folder: Path, manifest: bytes) -> None:
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMMITTED").write_text(hashlib.sha256(manifest).hexdigest())


def torch_zip(place: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"w": Payload(place.mark)}, file)
    return file.getvalue()


def put(name: str, data: Callable[[Any], bytes]) -> Callable[[Any, Path], None]:
    def write(place: Any, folder: Path) -> None:
        (folder / name).write_bytes(data(place))

    return write


def moved_outside(name: str) -> Callable[[Any, Path], None]:
    def spoil(place: Any, folder: Path) -> None:
        (folder / name).rename(place.outside / name)
        (folder / name).symlink_to(place.outside / name)

    return spoil
