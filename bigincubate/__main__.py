"""Run the command line: ``bigincubate`` and ``python -m bigincubate``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from .errors import INTERRUPTED, Exit

MAX_INTERRUPTS = 3
interrupts = 0


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Handle Ctrl-C: only the first one raises an error, so that a later one does not disturb the end of the command.

    If the command has still not ended at the third one, it ends at once.
    """
    global interrupts
    interrupts += 1
    if interrupts == 1:
        raise KeyboardInterrupt
    if interrupts >= MAX_INTERRUPTS:
        os._exit(Exit.INTERRUPTED)


def main() -> None:
    """Run the command line. Ctrl-C during the imports, which take a while, is one line as well."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from .cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        print(f"bigincubate: {INTERRUPTED}", file=sys.stderr, flush=True)
        raise SystemExit(Exit.INTERRUPTED) from None
    finally:
        if interrupts:  # Python is about to remove the handler
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
