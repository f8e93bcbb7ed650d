"""Find the files of a text source, and determine how each is read."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError
from ...files import quote_path
from ..dataset import DESCRIPTION
from ..sources.class_folders import is_split_name
from ..sources.image_files import walk_files
from .made_up import list_made_up

EMBEDDED_TEXT = ("stdlib", "made-up-text")
ONE_DOMAIN, TOP = "text", "."  # the domain of a source without folders, and of files outside of its folders
PLAIN, PIECES, HTML, LINES, PARQUET, MADE_UP = "plain", "pieces", "html", "lines", "parquet", "made-up"
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".cs", ".go"),
    *(".rs", ".swift", ".ts", ".tsx", ".jsx", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".f", ".f90", ".hs"),
    *(".ml", ".el", ".clj", ".ex", ".erl", ".sh", ".bash", ".sql"),
)
PAGE_ASSETS = (".js", ".css")  # source files, which are skipped if there are HTML pages
FORMS = {
    **dict.fromkeys((*PROSE, *CODE, *PAGE_ASSETS), PLAIN),
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), LINES),
    ".parquet": PARQUET,
}
EXPECTED = (
    "a folder or file of text (.txt, .md, .html, .py and other source files), .jsonl, .jsonl.gz, .jsonl.zst or"
    f" .parquet, or {' or '.join(EMBEDDED_TEXT)}"
)


class TextFile(NamedTuple):
    """A file that holds documents.

    Attributes:
        name: Its path relative to the source.
        path: Its path.
        domain: Name of the domain of its documents.
        form: How it is read: one of the constants of this module.
        stamp: Its size in bytes and modification time in nanoseconds.
    """

    name: str
    path: str
    domain: str
    form: str
    stamp: tuple[int, int] = (0, 0)

    def hash(self) -> str:
        """Return the SHA-256 of its bytes; an empty string if it cannot be read."""
        if self.form == MADE_UP:
            return self.name
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""


@dataclass(frozen=True)
class TextSource:
    """A source of text, with files that have not been read yet.

    Attributes:
        kind: ``text``, or the name of built-in text.
        files: The files, sorted by name.
        folder: The absolute path of the source; None for built-in text.
        notes: Information about the source for the description of the data, as plain JSON values.
    """

    kind: str
    files: list[TextFile]
    folder: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def has_columns(self) -> bool:
        """Return whether any file has columns or fields."""
        return any(file.form in (LINES, PARQUET) for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of the names, sizes and modification times of the files."""
        return self._hash(file.stamp for file in self.files)

    def content_hash(self, contents: Iterable[str]) -> str:
        """Return a SHA-256 of the names and contents of the files.

        Args:
            contents: The content hash of each file, in order.
        """
        return self._hash(contents)

    def _hash(self, values: Iterable[Any]) -> str:
        digest = hashlib.sha256(self.kind.encode())
        for file, value in zip(self.files, values, strict=True):
            digest.update(repr((file.name, file.domain, file.form, value)).encode())
        return digest.hexdigest()


def find_text(source: str) -> TextSource:
    """List the files of a source.

    Args:
        source: A folder, a file, or the name of built-in text.

    Raises:
        DataError: If it is missing, or has no files of text.
    """
    if source == "made-up-text":
        return TextSource(source, [TextFile(name, "", domain, MADE_UP) for name, domain in list_made_up()])
    if source == "stdlib":
        return _find_stdlib()
    path = Path(os.path.abspath(source))
    if path.is_file():
        return _take_file(path)
    if path.is_dir():
        return _walk_folder(path)
    raise DataError(f"no such source: {quote_path(path)}; expected {EXPECTED}")


def form_of(name: str) -> str | None:
    """Return how a file with this suffix is read; None if it is not read."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in (".gz", ".zst"):
        suffix = os.path.splitext(stem)[1] + suffix
    return FORMS.get(suffix)


def holds_only_text(path: Path) -> bool:
    """Return whether a path is a text file or a folder of only text files; not Parquet, which may hold images."""

    def is_text(name: str) -> bool:
        return form_of(name) not in (None, PARQUET)

    if not path.is_dir():
        return path.is_file() and is_text(path.name)
    found = False
    for name in walk_files(path):
        if not is_text(name):
            return False
        found = True
    return found


def _take_file(path: Path) -> TextSource:
    form = form_of(path.name)
    if form is None:
        raise DataError(f"{quote_path(path)}: unknown kind of text; expected {EXPECTED}")
    form = PIECES if form == PLAIN else form
    return TextSource("text", [TextFile(path.name, str(path), ONE_DOMAIN, form, file_stamp(str(path)))], str(path))


def _walk_folder(root: Path) -> TextSource:
    if (root / DESCRIPTION).exists():
        raise DataError(f"{quote_path(root)} is prepared data already; use it with --set data.path={quote_path(root)}")
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path in walk_files(root)]
    has_pages = any(form_of(name) == HTML for name in names)
    kept, skipped = list[str](), Counter[str]()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if form_of(name) is None or (has_pages and suffix in PAGE_ASSETS):
            skipped[suffix or "without a suffix"] += 1
        elif _is_special(root / name):
            skipped["pipe or device"] += 1
        else:
            kept.append(name)
    if not kept:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.most_common(4)) or "no files at all"
        raise DataError(f"no text in {quote_path(root)}: found {found}; expected {EXPECTED}")
    folders = {name.partition("/")[0] for name in kept if "/" in name}
    if len(folders) > 1 and all(map(is_split_name, folders)):
        found = ", ".join(f"{name}/" for name in sorted(folders))
        raise DataError(
            f"{quote_path(root)} has {found}, but the splits of text are chosen by the names of documents; prepare only"
            " the folder for training, or move all files into one folder"
        )
    files = [
        TextFile(name, str(root / name), _domain(name, folders), str(form_of(name)), file_stamp(str(root / name)))
        for name in sorted(kept)
    ]
    return TextSource("text", files, str(root), {"skipped": dict(sorted(skipped.items()))})


def _is_special(path: Path) -> bool:
    """Return whether opening a path may block forever. A broken link is not special: it is reported as unreadable."""
    return path.exists() and not path.is_file()


def _domain(name: str, folders: set[str]) -> str:
    if not folders:
        return ONE_DOMAIN
    return name.partition("/")[0] if "/" in name else TOP


def file_stamp(path: str) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in nanoseconds; (-1, -1) for a broken link."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _find_stdlib() -> TextSource:
    """Return the modules of the running interpreter's standard library that are on the list of this package."""
    folder = sysconfig.get_path("stdlib")
    names = resources.files(__package__).joinpath("stdlib_modules.txt").read_text().split()
    files = [TextFile(name, path := os.path.join(folder, name), "stdlib", PLAIN, file_stamp(path)) for name in names]
    found = [file for file in files if file.stamp[0] >= 0]
    if not found:
        raise DataError(f"{quote_path(folder)} has no modules of Python's standard library; use another source")
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return TextSource("stdlib", found, None, {"interpreter": interpreter, "missing_modules": len(files) - len(found)})
