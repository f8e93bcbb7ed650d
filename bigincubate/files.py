"""Read and write files safely. After a crash, a file has either the old or the new content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import RETRY, BigincubateError, ConfigError, SystemResourceError, describe_solution, format_os_error

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)  # of the environment, in a path
MAX_PATH_BYTES, MAX_PATH_FOLDERS = 4096, 500  # PATH_MAX of Linux; pathlib creates folders by recursion


def expand_path(text: str | Path, base: Path | None = None) -> Path:
    """Return a path that a user wrote as an absolute path: the rule for all options and recipe keys that are paths.

    A ``~`` at the start and environment variables (``$NAME`` and ``${NAME}``) are expanded. The result can be expanded
    again without a change, because a path in which ``$NAME`` remains is refused.

    Args:
        text: The path.
        base: Folder that a relative path is relative to; None for the working directory.

    Raises:
        ConfigError: The path is empty, too long or not UTF-8, has a NUL character, names a variable that is not
            set, or has a loop of symbolic links.
    """
    given = os.fspath(text)
    if not given or "\0" in given:
        raise ConfigError(f"{given!r} is not a path; expected the name of a file or folder")
    expanded = VARIABLE.sub(lambda match: os.environ.get(match[1] or match[2], match[0]), os.path.expanduser(given))
    path = os.path.abspath(os.path.join(base or os.getcwd(), expanded))
    if (unset := VARIABLE.search(path)) is not None:
        raise ConfigError(
            f"the environment variable {unset[0]} is not set in {given!r}; set it, or write out its value"
        )
    try:
        too_long = len(path.encode()) >= MAX_PATH_BYTES or path.count("/") > MAX_PATH_FOLDERS
    except UnicodeEncodeError:  # Python keeps bytes of a file name that are not UTF-8 as lone surrogates
        raise ConfigError(f"{path!r} is not UTF-8; rename it, or use a symbolic link with another name") from None
    if too_long:
        raise ConfigError(f"{path[:200]!r}… has {len(path)} characters, too many for a path")
    try:
        with suppress(OSError):  # reported by what uses the path
            Path(path).resolve()
    except RuntimeError:
        raise ConfigError(f"{path!r}: its symbolic links form a loop; remove one of them") from None
    return Path(path)


# what a file system without hard links answers
NO_HARD_LINKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EMLINK}
# a file is missing or of another type; after other errors, of permissions or of the disk, its content is unknown
MISSING_OR_WRONG_TYPE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG}
MISSING_OR_WRONG_TYPE |= {errno.ELOOP, errno.ENAMETOOLONG}
MAX_SMALL_FILE_BYTES = 2**26  # limit for files that are read into memory at once


def drop_folders(text: str) -> str:
    """Return a list of names and paths, separated by commas, in which every path is only the name of its file.

    What begins with the name of a library (``timm:NAME``) is no path, unless a path follows it.
    """

    def drop(part: str) -> str:
        library, place = re.fullmatch(r"((?:[\w-]+:)*)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        is_name = library and not re.match(r"[~.]|/(?!/)", place)
        return part if is_name else library + place.rpartition("/")[2]

    return ", ".join(map(drop, text.split(", ")))


def quote_path(path: Path | str) -> str:
    """Return an absolute path as it can be pasted into a shell."""
    return shlex.quote(os.path.abspath(path))


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and sync their directory entries to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        fsync_path(created.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a folder either completely or not at all.

    The block writes to a temporary folder next to it, which is synced to disk and renamed at the end, or removed if
    the block is left by an error or Ctrl-C.

    Args:
        folder: The folder. Missing parents are created.

    Yields:
        The temporary folder.

    Raises:
        OSError: The folder cannot be written, or has files already.
    """
    make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync_path(path)
        temporary.rename(folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; nothing if there is no such folder.

    Raises:
        OSError: The folder cannot be read, which :meth:`Path.glob` hides.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def is_present(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        OSError: This is unknown, for example because a folder on the way cannot be read.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno not in MISSING_OR_WRONG_TYPE:
            raise
        return False
    return True


def unreadable_error(error: OSError, path: Path, missing: type[BigincubateError], hint: str = "") -> BigincubateError:
    """Return what to raise because a file cannot be read.

    Args:
        error: Why it cannot be read.
        path: The file, if the error names none.
        missing: The class of the error if the file is missing or is no file. After any other error, such as one of
            permissions, the content is unknown and may be valid, and the class is `SystemResourceError`.
        hint: What to do if the file is missing or is no file.
    """
    text = format_os_error(error) if error.filename else f"{path}: {format_os_error(error)}"
    if error.errno in MISSING_OR_WRONG_TYPE:
        return missing("; ".join(filter(None, [text, hint])))
    return SystemResourceError(f"{text}; {describe_solution(error) or 'fix the problem'}, {RETRY}")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Name a path in errors of the operating system that name none, such as those of a full disk.

    Raises:
        OSError: Any error of the operating system that the block raises.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def raise_os_errors() -> Iterator[None]:
    """Raise errors of the operating system as such.

    safetensors and tokenizers are written in Rust and raise no OSError; only the text of their error has its number.

    Raises:
        OSError: There was such an error, for example a full disk.
    """
    try:
        yield
    except Exception as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def regular_file_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        OSError: The file is missing, or is not a regular file: a symbolic link may point anywhere, and reading a pipe
            or a device may never end.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "refused: not a regular file but a link, folder, pipe or device", str(path))
    return status.st_size


def check_is_file(path: Path) -> None:
    """Check that a path that a user gave is a file, or a link to one: reading a pipe or a device may never end.

    Raises:
        OSError: It is missing, or is something else.
    """
    _check_is_regular(path.stat(), path)


def _check_is_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a file but a folder, pipe or device", str(path))


def read_small_file(path: Path) -> bytes:
    """Return the content of a regular file of at most ``MAX_SMALL_FILE_BYTES`` bytes.

    Raises:
        OSError: See :func:`regular_file_size`; or the file is too large.
    """
    if (size := regular_file_size(path)) > MAX_SMALL_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes, expected at most {MAX_SMALL_FILE_BYTES}", str(path))
    return path.read_bytes()


def write_text(path: Path, text: str, *, exclusive: bool = False) -> bool:
    """Write ``text`` to ``path`` atomically: temporary file, fsync, rename.

    Args:
        path: The file. Its folder is created if needed.
        text: The new content.
        exclusive: Whether to keep an existing file instead of replacing it.

    Returns:
        Whether the text was written.

    Raises:
        OSError: The file cannot be written. An existing file is unchanged.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:  # not mkstemp, which ignores the umask
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        named = path.parent if isinstance(error, PermissionError) else path  # a file is created in its folder
        raise OSError(error.errno, error.strerror, str(named)) from None
    try:
        with name_in_errors(path), os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _create_from(temporary, path)
        else:
            _replace(temporary, path)
        fsync_path(path.parent)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Rename a temporary file to ``path``.

    Raises:
        OSError: This is not possible, for example because ``path`` is a folder. The error names it.
    """
    try:
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _create_from(temporary: Path, path: Path) -> None:
    """Create ``path`` with the content of a temporary file.

    Raises:
        FileExistsError: It exists.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # only one process can create the file, but others may see it empty for a moment
        with path.open("xb") as file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or contains something else.

    Raises:
        OSError: The file cannot be read, so its content is unknown.
    """
    try:
        value = json.loads(read_small_file(path))
    except OSError as error:
        if error.errno not in MISSING_OR_WRONG_TYPE:
            raise
        return None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the objects that :func:`append_json_line` wrote, without lines that a crash damaged.

    Args:
        path: The file; there are no objects if it is missing.
        last_bytes: Number of bytes at the end of the file to read; None to read all of it.

    Raises:
        OSError: The file cannot be read, or is not a file.
    """
    try:
        check_is_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = []
    with path.open("rb") as file:
        file.seek(0 if last_bytes is None else max(0, os.fstat(file.fileno()).st_size - last_bytes))
        for line in file.read().splitlines():  # a damaged line may not be UTF-8
            with suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    rows.append(row)
    return rows


def append_json_line(path: Path, value: Any) -> None:
    """Append a JSON object as one line in a single write, so that lines of several processes do not mix.

    If the last line is incomplete, because a process was killed or the disk was full, it stays a line of its own.

    Raises:
        OSError: The line could not be written completely, or ``path`` is not a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(value) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        status = os.fstat(handle)
        _check_is_regular(status, path)
        if (size := status.st_size) and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        with name_in_errors(path):
            while line:  # the first write is short only on a full disk; the next one then raises the error
                line = line[os.write(handle, line) :]
    finally:
        os.close(handle)


def write_and_hash(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write bytes-like ``chunks`` in order and fsync the file. A second thread hashes each chunk in parallel.

    Returns:
        The manifest entry of the file: ``size`` (bytes) and ``sha256``.
    """
    digest, size = hashlib.sha256(), 0
    with name_in_errors(path), path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            hashed = hasher.submit(digest.update, chunk)
            size += file.write(chunk)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def fsync_path(path: Path) -> None:
    """Sync a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(file: Path, other: Path) -> bool:
    """Create ``other`` as a hard link to ``file``; copy the content if the file system cannot link them.

    Only for files that are never changed in place, because a link shares the content.

    Returns:
        Whether it is a link.
    """
    try:
        os.link(file, other)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise
        shutil.copyfile(file, other)
        fsync_path(other)
        return False
    return True


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: It cannot be read, or is not a file.
    """
    check_is_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
