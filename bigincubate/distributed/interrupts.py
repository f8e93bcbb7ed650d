"""Handle Ctrl-C from the first line of the program on, before any import that takes a while."""

import os
import signal
import sys

INTERRUPTED = "interrupted; committed results and checkpoints are kept; run the same command again"
EXIT_CODE = 130
MAX_INTERRUPTS = 3

count = 0
raises = False  # whether there is code that catches KeyboardInterrupt; before, Ctrl-C ends the process at once


def install() -> None:
    """Install the handler, unless Ctrl-C is ignored or already has another handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


def handle(_number: int, _frame: object) -> None:
    """Handle Ctrl-C: only the first one raises an error, so that a later one does not disturb the end of the command.

    If the command has still not ended at the third one, it ends at once.
    """
    global count
    count += 1
    if not raises:
        say_interrupted()
        os._exit(EXIT_CODE)
    if count == 1:
        raise KeyboardInterrupt
    if count >= MAX_INTERRUPTS:
        os._exit(EXIT_CODE)


def say_interrupted() -> None:
    """Print the line that a command ends with after Ctrl-C."""
    print(f"bigincubate: {INTERRUPTED}", file=sys.stderr, flush=True)


def ignore_if_interrupted() -> None:
    """Ignore Ctrl-C from now on if it has ended the command, because Python is about to remove the handler."""
    if count:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
