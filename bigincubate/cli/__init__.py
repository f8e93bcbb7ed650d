"""The command line. Each command parses its arguments and calls one function, which is imported when it runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn

from ..distributed.interrupts import INTERRUPTED
from ..errors import RETRY, BigincubateError, Exit, describe_solution, format_os_error

# importing these adds their commands, in this order
from . import training, slurm as cluster, inspect as looking, report as reporting, data  # isort: skip
from . import track, models, checkpoint as checkpoints  # isort: skip
from .app import app, discard_unread_output, fail


def main() -> NoReturn:
    """Run the command line and exit with a documented code. User errors print one line without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # a file name may have bytes that are not UTF-8, and a terminal may not know all characters
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # it is closed
                stream.reconfigure(errors="backslashreplace")
    with discard_unread_output():
        _run()


def _run() -> NoReturn:
    try:
        code = app(standalone_mode=False)
    except BigincubateError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail(INTERRUPTED, Exit.INTERRUPTED)
    except OSError as error:
        solution = describe_solution(error)
        fail(format_os_error(error) + (solution and f"; {solution}, {RETRY}"), Exit.ENVIRONMENT)
    except MemoryError:
        fail("not enough memory on this machine; use smaller models, images or batches", Exit.ENVIRONMENT)
    except Exception as error:
        # usage errors of the argument parser, whose class is in a different module in each version of typer
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if not message:  # a command that needs a subcommand has printed its help
            raise SystemExit(Exit.USAGE) from None
        fail(f"{message} (see --help)", Exit.USAGE)
    if code == Exit.INTERRUPTED:  # typer has caught a KeyboardInterrupt
        fail(INTERRUPTED, Exit.INTERRUPTED)
    raise SystemExit(code or 0)
