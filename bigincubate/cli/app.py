"""The application, and the options and output functions that commands share."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO, get_args

import typer
from typer import Argument, Option

from .. import __version__
from ..distributed.rank_logging import LEVEL_VARIABLE, LogLevel
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import Recipe
    from ..storage.run_directory import RunDir
else:
    RunDir = Path  # for --help; the class is slow to import, so only `parse_run_dir` imports it, when a command runs

app = typer.Typer(
    name="bigincubate",
    help="Train the modules of a large model separately, then assemble and fine-tune them (Deep Incubation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Prepare data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(help="List, verify, convert and prune resume checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


MAX_COUNT = 1_000_000  # of anything that an option counts
MAX_LINE = 3000  # characters of an error message


def parse_path(text: str) -> Path:
    """Return the absolute path that an option or argument means: the parser of all that are paths."""
    from ..errors import ConfigError
    from ..files import expand_path

    if "://" in text:
        raise ConfigError(f"{text}: expected a file or folder on this machine, not a URL")
    return expand_path(text)


def parse_run_dir(text: str) -> RunDir:
    """Return the run directory that an argument names."""
    from ..storage import run_directory

    return run_directory.RunDir(parse_path(text))


RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="Name of an included recipe, or a .toml file.")]
RunDirOption = Annotated[
    RunDir,
    Option("--run-dir", metavar="DIR", parser=parse_run_dir, help="The run directory; created if it does not exist."),
]
SetOption = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a recipe key: --set train.lr=1e-3")
]
Method = Literal["incubate", "expand"]
MethodOption = Annotated[
    Method | None,
    Option(
        "--method",
        metavar="METHOD",
        help='incubate: all modules; expand: no module, same as --set plan.incubate="none" (default: the recipe\'s).',
    ),
]
LogLevelOption = Annotated[
    LogLevel,
    Option(
        "--log-level",
        envvar=LEVEL_VARIABLE,
        show_envvar=False,  # typer cuts a name of this length
        metavar="LEVEL",
        help=f"The lowest level that logs show: {', '.join(get_args(LogLevel))}. Also: the variable {LEVEL_VARIABLE}.",
    ),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
RunArgument = Annotated[RunDir, Argument(metavar="DIR", parser=parse_run_dir, help="A run directory.")]
RunsArgument = Annotated[list[RunDir], Argument(metavar="DIR…", parser=parse_run_dir, help="Run directories.")]
CheckpointsArgument = Annotated[
    Path, Argument(metavar="DIR", parser=parse_path, help="A run directory, a phase's directory, or a checkpoint.")
]


def _version(asked: bool) -> None:
    if asked:
        say(f"bigincubate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Accept the options that come before a command."""


def add_method(sets: list[str] | None, method: Method | None) -> list[str]:
    """Return the values of ``--set`` with what ``--method`` stands for.

    Raises:
        ConfigError: ``--set`` has the same key.
    """
    given = list(sets or ())
    if method is None:
        return given
    if any(item.partition("=")[0].strip() == "plan.incubate" for item in given):
        raise ConfigError(f"--method {method} stands for --set plan.incubate=…, which is given too; omit one of them")
    return [*given, f"plan.incubate={'none' if method == 'expand' else 'all'}"]


def check_method(method: Method | None, recipe: Recipe) -> None:
    """Check that a recipe has modules to which ``--method`` applies.

    Raises:
        ConfigError: It fine-tunes a finished model.
    """
    if method is not None and recipe.finetune.init is not None:
        raise ConfigError(f"--method {method}: finetune.init is a finished model without modules; omit one of the two")


def console() -> Any:
    """Return a rich console. Output to a pipe is 200 columns wide, so that tables are not wrapped.

    Square brackets in names and paths are not markup.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_display(action: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress (done, total): as a bar on a terminal, otherwise as a line now and then."""
    if not console().is_terminal:
        yield _ProgressLines(action, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task(action, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


class _ProgressLines:
    """Prints a line at the start, for each further tenth of the work, and once a minute."""

    def __init__(self, action: str, unit: str) -> None:
        self.action, self.unit, self.tenths, self.time = action, unit, -1, 0.0

    def __call__(self, done: int, total: int) -> None:
        tenths, now = 10 * done // max(total, 1), time.monotonic()
        if tenths > self.tenths or now > self.time + 60:
            self.tenths, self.time = tenths, now
            say(f"{self.action}: {done:,} of {total:,} {self.unit}")


class UnreadOutput:
    """A text stream that discards text after its reader has closed: another command (``| head``) or a terminal.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or discard what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def discard_unread_output() -> Iterator[None]:
    """Let a command run to its end if the reader of its output has closed, or if it was started without output."""
    before = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w") for stream in before]  # noqa: SIM115  # None if the file was closed
    sys.stdout, sys.stderr = map(UnreadOutput, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def say(text: str) -> None:
    """Print a line to standard output without buffering."""
    print(text, flush=True)


def escape_control_characters(text: str) -> str:
    """Return a text in which characters that do not print, among them line breaks, are Python's escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1))


def fail(message: str, code: int) -> NoReturn:
    """Print a one-line error to standard error and exit with ``code``.

    Control characters are printed as escapes. The middle of a long line is left out, because a value that the message
    quotes may have any length.
    """
    line = escape_control_characters(message)
    if len(line) > MAX_LINE:
        line = f"{line[: 2 * MAX_LINE // 3]} … {line[-MAX_LINE // 3 :]}"
    print(f"bigincubate: {line}", file=sys.stderr, flush=True)
    raise SystemExit(code)
