"""What a user can do wrong, and the exit code each ends with.

The command line prints the message alone, never a traceback: one line that says what is wrong and what to do.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command; scripts rely on them."""

    DONE = 0
    USAGE = 2
    ENVIRONMENT = 3
    ARTIFACT = 4
    NON_FINITE = 5
    DAMAGED = 6
    LOCKED = 7
    PREEMPTED = 75


class BigincubateError(Exception):
    """An error with a cause outside the program. ``code`` is the exit code."""

    code: Exit = Exit.USAGE


class ConfigError(BigincubateError):
    """A recipe, a flag or a combination of them that cannot be right."""

    code = Exit.USAGE


class EnvironmentFault(BigincubateError):
    """Data that is missing or damaged, a machine that lacks something, or a rank that stands still."""

    code = Exit.ENVIRONMENT


class ArtifactError(BigincubateError):
    """A module or model that is missing, stale, or belongs to another run."""

    code = Exit.ARTIFACT


class NonFiniteError(BigincubateError):
    """The loss or its gradient stopped being a number."""

    code = Exit.NON_FINITE


class DamagedError(BigincubateError):
    """Every checkpoint of a phase fails its verification, or one that was asked for by name."""

    code = Exit.DAMAGED


class LockedError(BigincubateError):
    """Another live process owns the directory."""

    code = Exit.LOCKED


class Preempted(BigincubateError):
    """Stopped on request after a checkpoint: the same command goes on from there."""

    code = Exit.PREEMPTED
