"""The command line. Each command parses its arguments and calls one function, which is imported when it runs."""

from __future__ import annotations

from typing import NoReturn

from ..errors import BigincubateError, Exit

from . import training, slurm as cluster, inspect as looking, report as reporting, models, checkpoint as checkpoints  # isort: skip # importing them adds their commands, in this order
from .app import app, fail


def main() -> NoReturn:
    """Run the command line and exit with a documented code. User errors print one line without a traceback."""
    try:
        code = app(standalone_mode=False)
    except BigincubateError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail(
            "interrupted; committed results and checkpoints are kept; run the same command again to resume",
            Exit.PREEMPTED,
        )
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), Exit.ENVIRONMENT)
    except Exception as error:
        # usage errors of the argument parser, whose class is in a different module in each version of typer
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if not message:  # a command that needs a subcommand has printed its help
            raise SystemExit(Exit.USAGE) from None
        fail(f"{message} (see --help)", Exit.USAGE)
    raise SystemExit(code or 0)
