"""Documents: the texts in the files of a source, read one after another."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ...errors import ConfigError, DataError, MissingDependencyError
from ...files import quote_path
from ..sources.archives import damaged_archive
from .files import HTML, LINES, MADE_UP, PARQUET, PIECES, TextFile
from .html import html_to_text
from .made_up import write_made_up

MAX_DOCUMENT_BYTES = 2**28  # limited, because a document is tokenized as a whole
PIECE_BYTES = 2**14  # minimum size of the documents into which a single text file is divided
BATCH_ROWS = 64  # rows of a Parquet file that are read at once
NOT_UTF8 = "not UTF-8: convert it with iconv"


class Document(NamedTuple):
    """A document as it was read.

    Attributes:
        name: Its unique name in the source.
        text: Its text in UTF-8; empty if it cannot be read.
        problem: Why it cannot be read; empty if it can.
    """

    name: str
    text: bytes
    problem: str = ""


def read_documents(file: TextFile, column: str) -> Iterator[Document]:
    """Yield the documents of a file.

    Args:
        file: The file.
        column: The field or column that holds the text, in JSON lines and Parquet files.

    Raises:
        ConfigError: If there is no such column.
        DataError: If the file is damaged.
        MissingDependencyError: If the form needs a package that is not installed.
    """
    if file.form == LINES:
        return _read_lines(file, column)
    if file.form == PARQUET:
        return _read_parquet(file, column)
    if file.form == MADE_UP:
        return iter((Document(file.name, write_made_up(file.name).encode()),))
    return _read_whole(file)


def _read_whole(file: TextFile) -> Iterator[Document]:
    """Yield the content of a file: as one document, or divided into pieces."""
    try:
        content = Path(file.path).read_bytes().removeprefix(BOM_UTF8)
    except OSError as error:
        yield Document(file.name, b"", error.strerror or type(error).__name__)
        return
    if file.form == PIECES:
        yield from (_check(f"{file.name}:{first:012}", content[first:last]) for first, last in _cut(content))
        return
    document = _check(file.name, content)
    yield document._replace(text=html_to_text(document.text.decode()).encode()) if file.form == HTML else document


def _cut(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each piece of a text: it ends at a blank line or, if there is none, at a line end."""
    first = 0
    while first < len(text):
        least = first + PIECE_BYTES
        ends = (text.find(end, least, least + PIECE_BYTES) + len(end) for end in (b"\n\n", b"\n"))
        last = next((end for end in ends if end > least), text.find(b"\n", least) + 1)
        last = last if last > least else len(text)
        yield first, last
        first = last


def _check(name: str, text: bytes) -> Document:
    """Return a document; if its text is too large or not UTF-8, only with the problem."""
    if len(text) > MAX_DOCUMENT_BYTES:
        return Document(name, b"", f"{len(text):,} bytes, but a document may have only {MAX_DOCUMENT_BYTES:,}")
    try:
        text.decode()
    except UnicodeDecodeError:
        return Document(name, b"", NOT_UTF8)
    return Document(name, text)


def _take_value(name: str, value: Any) -> Document:
    """Return the document in a field of a row."""
    if value is None:
        return Document(name, b"")
    if isinstance(value, bytes):
        return _check(name, value)
    if not isinstance(value, str):
        return Document(name, b"", f"expected text, got {type(value).__name__}")
    try:
        return _check(name, value.encode())
    except UnicodeEncodeError:
        return Document(name, b"", "not valid Unicode: half of a surrogate pair")


# ------------------------------------------------------------------------------------------------ JSON lines


def _read_lines(file: TextFile, column: str) -> Iterator[Document]:
    with closing(_open_lines(file.path)) as lines:
        for number, line in enumerate(_intact(file.path, lines), start=1):
            if line.strip():
                yield _read_line(file, number, line, column)


def _read_line(file: TextFile, number: int, line: bytes, column: str) -> Document:
    name = f"{file.name}:{number:09}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return Document(name, b"", NOT_UTF8)
    except (ValueError, RecursionError):
        return Document(name, b"", "not a line of JSON")
    if not isinstance(row, dict):
        return Document(name, b"", "not a JSON object")
    if column not in row:
        have = ", ".join(map(str, list(row)[:10])) or "nothing"
        if number == 1:
            raise ConfigError(f"--column {column}: no such field in {quote_path(file.path)}: its first line has {have}")
        return Document(name, b"", f"no field {column}: it has {have}")
    return _take_value(name, row[column])


def _open_lines(path: str) -> IO[bytes]:
    """Open a file of JSON lines, decompressing it if needed."""
    if path.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path))
    return _open_zstd(path) if path.lower().endswith(".zst") else open(path, "rb")


def _open_zstd(path: str) -> IO[bytes]:
    """Open a Zstandard file: as a stream with pyarrow, or otherwise with zstd, a dependency of mosaicml-streaming."""
    try:
        import pyarrow
    except ImportError:
        import zstd
    else:
        return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    try:
        return io.BytesIO(zstd.decompress(Path(path).read_bytes()))
    except zstd.Error:
        raise DataError(
            f"{quote_path(path)} is damaged, or was compressed as a stream, which needs pyarrow: pip install"
            f" 'bigincubate[parquet]', or unpack it with: zstd -d {quote_path(path)}"
        ) from None


def _intact(path: str, lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines, and convert the errors of a damaged file to `DataError`."""
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged_archive(path, str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise damaged_archive(path, str(error)) from None  # pyarrow's errors have no number


# ------------------------------------------------------------------------------------------------ Parquet


def _read_parquet(file: TextFile, column: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependencyError(
            f"{quote_path(file.path)}: reading Parquet files needs pyarrow; install it with: pip install"
            " 'bigincubate[parquet]'"
        ) from None
    try:
        with ParquetFile(file.path) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise ConfigError(
                    f"--column {column}: no such column in {quote_path(file.path)}: it has {', '.join(names[:10])}"
                )
            number = 0
            for batch in opened.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
                for value in _values(batch.column(0)):
                    number += 1
                    yield _take_value(f"{file.name}:{number:09}", value)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged_archive(file.path, str(error)) from None


def _values(values: Any) -> Iterator[Any]:
    """Yield the values of an array; text that is not UTF-8 is yielded as bytes."""
    for value in values:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield value.as_buffer().to_pybytes()
