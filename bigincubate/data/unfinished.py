"""The folder of a data set while it is being prepared."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from ..errors import RETRY, ConfigError, DataError, SystemResourceError, describe_solution, format_os_error
from ..files import name_in_errors, quote_path
from .dataset import UNFINISHED, read_json, write_json
from .file_locks import folder_lock

PREPARE_SECONDS = 86400.0  # limit for waiting for another process that prepares the same data


def refuse_inside(out: Path, source: str) -> None:
    """Check that the folder for prepared data is not inside the source.

    Raises:
        ConfigError: It is inside the source.
    """
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"--out {quote_path(out)} is inside the source {quote_path(source)}; use a folder outside it")


@contextmanager
def preparing(source: str, out: Path) -> Iterator[None]:
    """Allow only one process to prepare data in ``out`` while the block runs, and explain errors that stop it.

    Args:
        source: The source, for messages.
        out: The folder of the data, which may be missing.

    Raises:
        SystemResourceError: If a file cannot be written, or a process was killed.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with name_in_errors(out), folder_lock(out, PREPARE_SECONDS):
            yield
    except OSError as error:
        solution = describe_solution(error) or "fix the problem"
        raise SystemResourceError(
            f"cannot prepare {source}: {format_os_error(error)}; {solution}, {RETRY} to resume"
        ) from None
    except BrokenProcessPool:
        raise SystemResourceError(
            f"a process preparing {source} was killed (out of memory?); run the same command again to resume"
        ) from None


def begin_folder(out: Path, kind: str, folder: str | None) -> None:
    """Create the folder of a data set, or clean up the one that an interrupted command has left.

    Args:
        out: The folder of the data.
        kind: The kind of source.
        folder: Where the source is; None for built-in data.

    Raises:
        DataError: If the folder holds anything else.
    """
    mark = {"kind": kind, "folder": folder}
    if (out / UNFINISHED).exists():
        before = read_json(out / UNFINISHED).get("source")
        if isinstance(before, dict) and any(before.get(key, value) != value for key, value in mark.items()):
            where = before.get("folder") or before.get("kind")
            raise DataError(
                f"{quote_path(out)} holds data from another source, not yet complete: {where}; delete it or use another"
                " folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{quote_path(out)} holds other files; use a new or empty folder")
    out.mkdir(exist_ok=True)
    write_json(out / UNFINISHED, {"source": mark})
    for leftover in (*out.glob(".tmp-*"), *out.glob("parts")):
        if not leftover.is_dir():
            leftover.unlink()
            continue
        # rename it first, so that a remaining process of a killed command, which still writes to it, cannot complete it
        shutil.rmtree(leftover.rename(out / f".tmp-removed-{secrets.token_hex(4)}"))
