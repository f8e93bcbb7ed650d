"""The command line. A command parses its arguments and calls one function, which it imports when it runs."""

from __future__ import annotations

from typing import NoReturn

from ..errors import BigincubateError, Exit

from . import training, slurm as cluster, inspect as looking, report as reporting, models, checkpoint as checkpoints  # isort: skip # they add their commands, in this order
from .app import app, fail


def main() -> NoReturn:
    """Run the command line and exit with a documented code. Errors that a user can cause are one line, no traceback."""
    try:
        code = app(standalone_mode=False)
    except BigincubateError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail("interrupted; nothing that was committed is lost, the same command goes on", Exit.PREEMPTED)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), Exit.ENVIRONMENT)
    except Exception as error:
        # usage errors of the argument parser, wherever this version of typer keeps their class
        if not hasattr(error, "format_message"):
            raise
        fail(f"{error.format_message()} (see --help)", Exit.USAGE)
    raise SystemExit(code or 0)
