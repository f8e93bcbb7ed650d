"""Small files that survive a crash: written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SMALL = 2**26  # bytes; no file that is read into memory whole has a reason to be larger


def make_folder(folder: Path) -> None:
    """A folder, and those above it that are missing; their names are on the disk when this returns."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


def plain_size(path: Path) -> int:
    """Bytes of a plain file.

    Raises:
        OSError: missing; a symbolic link, which may lead anywhere; a pipe or a device, which may never end.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file (a link, a folder, a pipe, a device); refused", str(path))
    return status.st_size


def read_small(path: Path) -> bytes:
    """What is in a plain file of at most ``SMALL`` bytes.

    Raises:
        OSError: as :func:`plain_size`; or it is larger.
    """
    if (size := plain_size(path)) > SMALL:
        raise OSError(errno.EFBIG, f"{size} bytes, expected at most {SMALL}", str(path))
    return path.read_bytes()


def write_text(path: Path, text: str, *, exclusive: bool = False) -> bool:
    """Put ``text`` at ``path`` atomically (temporary file, fsync, rename). With ``exclusive`` an existing file is
    left alone. Returns whether ``path`` now holds ``text``."""
    make_folder(path.parent)
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    # not mkstemp: what others may read and write is for the umask to say
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        else:
            os.replace(temporary, path)
            temporary = ""
        fsync_dir(path.parent)
        return True
    finally:
        if temporary:
            os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object, or None where the file is missing or holds no JSON object."""
    try:
        value = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What :func:`append_line` wrote; a last line that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_line(path: Path, value: Any) -> None:
    """Append one JSON object as a line, in one write, so that processes do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(value) + "\n").encode())
    finally:
        os.close(handle)


def write_hashed(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write bytes-like ``chunks`` one after the other, each hashed by another thread meanwhile, and fsync.

    Returns:
        What a manifest says of the file: ``size`` (bytes) and ``sha256``.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        for chunk in chunks:
            hashed = beside.submit(digest.update, chunk)
            size += file.write(chunk)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def fsync_dir(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
