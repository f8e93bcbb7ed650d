"""Errors that a user can cause or fix, and the exit code of each.

The command line prints only the message, never a traceback: one line that says what is wrong and how to fix it.
"""

from __future__ import annotations

from enum import IntEnum


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
    """Base class of problems with the data, the machine or the installation."""

    code = Exit.ENVIRONMENT


class DataError(ExternalError):
    """Data, or weights from elsewhere, are missing, damaged or cannot be downloaded."""


class SystemResourceError(ExternalError):
    """The machine or the cluster cannot provide what is needed: disk space, a directory, an answer from Slurm."""


class RankTimeoutError(ExternalError):
    """A rank gave no sign of life for too long."""


class MissingDependencyError(ExternalError):
    """A program or a Python package that is needed is not installed."""


class ArtifactError(BigincubateError):
    """A module or model is missing, stale, or belongs to another run."""

    code = Exit.ARTIFACT


class NonFiniteError(BigincubateError):
    """The loss or its gradient is not finite."""

    code = Exit.NON_FINITE


class DamagedError(BigincubateError):
    """Every checkpoint of a phase, or one that was given by name, fails its verification."""

    code = Exit.DAMAGED


class LockedError(BigincubateError):
    """Another live process owns the directory."""

    code = Exit.LOCKED


class Preempted(BigincubateError):
    """Training was asked to stop and saved a checkpoint. The same command resumes from it."""

    code = Exit.PREEMPTED


def error_of_code(code: int) -> type[BigincubateError]:
    """Return the class of the errors with an exit code; `ExternalError` for a code that is not documented."""
    classes = (ConfigError, ArtifactError, NonFiniteError, DamagedError, LockedError, Preempted)
    return next((error for error in classes if error.code == code), ExternalError)
