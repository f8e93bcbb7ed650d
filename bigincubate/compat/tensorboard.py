"""TensorBoard's writer, imported without boto3, which TensorBoard imports to write to S3.

Its thread prints no traceback if the disk is full: it keeps the error, and the next call of the writer raises it.
"""

from __future__ import annotations

from contextlib import suppress

from .lean_imports import replaced_modules

with replaced_modules({"botocore": None, "boto3": None}):
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["SummaryWriter"]

_run = _AsyncWriterThread.run


def _run_without_traceback(thread: _AsyncWriterThread) -> None:
    with suppress(OSError):
        _run(thread)


_AsyncWriterThread.run = _run_without_traceback
