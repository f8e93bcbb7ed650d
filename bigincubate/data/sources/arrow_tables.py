"""Read single columns of Parquet and Arrow files, one group of rows at a time. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

PARQUET, ARROW = ".parquet", ".arrow"
BATCH_ROWS = 16  # read at once: an image may have many megabytes
BUFFER_BYTES = 2**20  # read at once from a row group, which may be as large as the file
FILE_MAGIC = b"ARROW1"  # begins the file format of Arrow; without it, a file is a stream
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class TableFile(Protocol):
    """An open file.

    Attributes:
        schema: The Arrow schema.
    """

    schema: Any

    def read_groups(self, column: str) -> Iterator[list[Any]]:
        """Yield the values of a column, group by group."""

    def read_group(self, column: str, field: str | None, group: int) -> Iterator[list[Any]]:
        """Yield the values of a column of one group, at most `BATCH_ROWS` at a time.

        Args:
            column: The column.
            field: The only field of it that is needed. The values are then dicts with at least this field.
            group: The number of the group.
        """


@contextmanager
def open_table(file: Path | str) -> Iterator[TableFile]:
    """Open a file by its suffix.

    Raises:
        ArrowException: It is damaged.
        OSError: It cannot be read.
    """
    with open(file, "rb"):  # the error of pyarrow would not name the file
        pass
    if str(file).lower().endswith(ARROW):
        import pyarrow

        with closing(pyarrow.memory_map(str(file))) as source:
            yield _ArrowFile(source)
    else:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file, buffer_size=BUFFER_BYTES) as opened:
            yield _ParquetFile(opened)


class _ParquetFile:
    """A Parquet file, in its row groups."""

    def __init__(self, opened: Any) -> None:
        self.schema, self._file = opened.schema_arrow, opened

    def read_groups(self, column: str) -> Iterator[list[Any]]:
        for group in range(self._file.num_row_groups):
            yield self._file.read_row_group(group, columns=[column], use_threads=False).column(0).to_pylist()

    def read_group(self, column: str, field: str | None, group: int) -> Iterator[list[Any]]:
        names = [f"{column}.{field}" if field else column]
        for batch in self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
            yield batch.column(0).to_pylist()


class _ArrowFile:
    """A file or stream of Arrow, in its record batches. It is mapped to memory, so only what is used is read."""

    def __init__(self, source: Any) -> None:
        import pyarrow

        self._source, self._is_stream = source, source.read(len(FILE_MAGIC)) != FILE_MAGIC
        self.schema = self._open(None).schema
        if self._is_stream:
            source.seek(source.size() - len(STREAM_END))
            if source.read(len(STREAM_END)) != STREAM_END:  # pyarrow accepts a stream without its last batches
                raise pyarrow.ArrowInvalid("the stream has no end, so it is not complete")

    def _open(self, column: str | None) -> Any:
        from pyarrow import ipc

        self._source.seek(0)
        fields = None if column is None else [self.schema.get_field_index(column)]
        options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        return (ipc.open_stream if self._is_stream else ipc.open_file)(self._source, options=options)

    def _read_batches(self, column: str) -> Iterator[Any]:
        opened = self._open(column)
        yield from opened if self._is_stream else map(opened.get_batch, range(opened.num_record_batches))

    def read_groups(self, column: str) -> Iterator[list[Any]]:
        for batch in self._read_batches(column):
            yield _to_list(batch.column(0))

    def read_group(self, column: str, field: str | None, group: int) -> Iterator[list[Any]]:
        batch = next((batch for number, batch in enumerate(self._read_batches(column)) if number == group), None)
        values = batch.column(0) if batch is not None else []
        for begin in range(0, len(values), BATCH_ROWS):
            yield _to_list(values[begin : begin + BATCH_ROWS])


def _to_list(values: Any) -> list[Any]:
    """Return Arrow values as Python objects. Positions in a damaged file may lie outside of it, so they are checked."""
    values.validate(full=True)
    items: list[Any] = values.to_pylist()
    return items
