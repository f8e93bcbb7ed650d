"""Errors that a user can cause or fix, and their exit codes.

The command line prints only the message, not a traceback: one line that says what is wrong and how to fix it.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from enum import IntEnum
from pathlib import Path

RETRY = "then run the same command again"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class Exit(IntEnum):
    """Exit codes of all commands. Scripts rely on them."""

    DONE = 0
    USAGE = 2
    ENVIRONMENT = 3
    ARTIFACT = 4
    NON_FINITE = 5
    DAMAGED = 6
    LOCKED = 7
    PREEMPTED = 75
    INTERRUPTED = 130


class BigincubateError(Exception):
    """Base class of the errors that are shown to a user as one line.

    Attributes:
        code: The exit code of the command.
    """

    code: Exit = Exit.USAGE


class ConfigError(BigincubateError):
    """A recipe, a command-line flag, or a combination of them is invalid."""

    code = Exit.USAGE


class ExternalError(BigincubateError):
    """Base class of errors in the data, the machine or the installation."""

    code = Exit.ENVIRONMENT


class DataError(ExternalError):
    """Data or pretrained weights are missing or damaged, or cannot be downloaded."""


class HubError(ExternalError):
    """A model hub cannot be reached, or refuses what it is asked for."""


class SystemResourceError(ExternalError):
    """A resource of the machine or the cluster is unavailable: disk space, a directory, a response from Slurm."""


class RankTimeoutError(ExternalError):
    """A rank did not respond for too long."""


class MissingDependencyError(ExternalError):
    """A required program or Python package is not installed."""


class ArtifactError(BigincubateError):
    """A module, a model or kept optimizer state is missing, damaged, stale, or belongs to another run."""

    code = Exit.ARTIFACT


class NonFiniteError(BigincubateError):
    """The loss or its gradient is not finite."""

    code = Exit.NON_FINITE


class DamagedError(BigincubateError):
    """All checkpoints from which a phase could resume, or a checkpoint that was given by name, fail verification."""

    code = Exit.DAMAGED


class LockedError(BigincubateError):
    """Another running process owns the directory."""

    code = Exit.LOCKED


class Preempted(BigincubateError):
    """Training was asked to stop and saved a checkpoint, from which the same command resumes."""

    code = Exit.PREEMPTED


def format_command(*words: object) -> str:
    """Return a command of this program, for messages. It can be pasted into a shell, whatever the words contain."""
    return shlex.join(["bigincubate", *map(str, words)])


def format_count(count: int, noun: str) -> str:
    """Return a number of things, such as ``1 class`` or ``1,200 classes``, for messages."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def format_os_error(error: OSError) -> str:
    """Return the reason of an error of the operating system, with the file if there is one."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree, one entry for each file
        return str(error.args[0][0][-1])
    reason = error.strerror or str(error)
    name = error.filename2 or error.filename  # the second one is the target of a copy, link or rename
    return f"{name}: {reason}" if name else reason


def describe_solution(error: OSError) -> str:
    """Return what a user can do about an error of the operating system; empty if there is no general advice."""
    if isinstance(error, PermissionError):
        return f"change {_describe_permissions(error)}"
    if error.errno in DISK_IS_FULL:
        return "free some disk space"
    return "check the disk or the network file system" if error.errno in (errno.EIO, errno.ESTALE) else ""


def _describe_permissions(error: PermissionError) -> str:
    """Return which permissions to change: those of the path, or of a folder if the path would be created in it."""
    name = error.filename2 or error.filename
    if not isinstance(name, str | os.PathLike) or not os.path.isabs(name):  # relative to an unknown folder
        return "the permissions"
    path = Path(name)
    if error.filename2:
        return f"the permissions of {path.parent}"
    found = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    return "its permissions" if found == path else f"the permissions of {found}"


def check_integer(name: str, value: object, least: int = 1) -> None:
    """Check an argument of the Python API.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        least: The smallest valid value.

    Raises:
        ConfigError: The value is no integer, or is too small.
    """
    if type(value) is not int or value < least:  # bool is a subclass of int
        raise ConfigError(f"{name} = {value!r}: expected an integer of at least {least}")


def error_of_code(code: int) -> type[BigincubateError]:
    """Return the error class of an exit code; `ExternalError` for an undocumented code."""
    classes = (ConfigError, ArtifactError, NonFiniteError, DamagedError, LockedError, Preempted)
    return next((error for error in classes if error.code == code), ExternalError)
