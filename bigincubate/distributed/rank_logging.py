"""Logging of a training process: which ranks write which records, and in which format."""

from __future__ import annotations

import logging
import sys
from typing import Literal, get_args

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LEVEL_VARIABLE = "BIGINCUBATE_LOG_LEVEL"  # environment variable that sets the default of --log-level


def setup_logging(level: LogLevel = "info", rank: int = 0) -> None:
    """Write the log records of this package to the console. A later call replaces the level and the rank.

    Rank 0 writes records of ``level`` and above. Other ranks write only warnings and errors, so that messages of all
    ranks appear once. Warnings and errors go to stderr, other records to stdout.

    Args:
        level: The lowest level that is written.
        rank: Rank of this process.
    """
    handler = ConsoleHandler()
    handler.setFormatter(RankFormatter(rank))
    lowest = logging.getLevelName(level.upper())
    logger = logging.getLogger("bigincubate")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(lowest if rank == 0 else max(lowest, logging.WARNING))


class RankFormatter(logging.Formatter):
    """Format records as ``2026-01-31 12:00:00 rank 1 WARNING: text``.

    Args:
        rank: Rank of this process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s rank {rank} %(levelname)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class ConsoleHandler(logging.StreamHandler):
    """Write warnings and errors to stderr, and other records to stdout.

    The streams are looked up for each record, because progress bars replace ``sys.stdout`` and ``sys.stderr`` to print
    lines above the bars.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record and flush the stream."""
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)
