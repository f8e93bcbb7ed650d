"""Read the files that W&B writes offline: a log in the format of LevelDB, whose records are protocol buffers.

W&B has no public function that reads them. ``wandb sync`` reads the same format, including files of older versions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAGIC = b":W&B"
FILE_HEADER, BLOCK = 7, 32768
HEADER = struct.Struct("<IHB")  # checksum, length and kind of a chunk
FULL, FIRST, LAST = 1, 2, 4  # kinds of chunks; those of a record that spans blocks are between FIRST and LAST


def quiet_settings() -> Any:
    """Return settings with which W&B records only what is logged: no console, code, git state or machine metrics."""
    import wandb

    return wandb.Settings(
        console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True, x_disable_meta=True
    )


def read_recorded(file: Path) -> tuple[int, set[str]]:
    """Return the last step in a ``.wandb`` file, -1 if there is none, and the keys of its summary.

    The file may be incomplete, because its writer is running or was killed.

    Raises:
        ValueError: The file has another format.
    """
    step, keys = -1, set()
    for record in _records(file.read_bytes()):
        if record.HasField("history"):
            step = max(step, record.history.step.num)
        elif record.HasField("summary"):
            keys |= {item.key or "/".join(item.nested_key) for item in record.summary.update}
    return step, keys


def _records(content: bytes) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    if content[: len(MAGIC)] != MAGIC[: len(content)]:
        raise ValueError("not a file of W&B")
    position, data = FILE_HEADER, b""
    while position + HEADER.size <= len(content):
        if (rest := BLOCK - position % BLOCK) < HEADER.size:
            position += rest
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        chunk = content[position + HEADER.size : position + HEADER.size + length]
        if kind == 0 or len(chunk) < length:
            return
        position += HEADER.size + length
        data = chunk if kind in (FULL, FIRST) else data + chunk
        if kind in (FULL, LAST):
            record = Record()
            try:
                record.ParseFromString(data)
            except DecodeError as error:
                raise ValueError(f"a record cannot be read: {error}") from None
            yield record
