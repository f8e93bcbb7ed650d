"""Files that may not be read, also if root runs the tests."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest


def deny(patch: pytest.MonkeyPatch, path: Path, number: int = errno.EACCES) -> None:
    """Refuse what a user without permissions cannot do: open a file, or read a folder and use what is in it.

    Args:
        patch: Undoes it.
        path: The file or folder.
        number: The number of the error.
    """

    def refuse(owner: Any, name: str, *, itself: bool) -> None:
        original = getattr(owner, name)

        def call(place: Any = ".", *arguments: Any, **options: Any) -> Any:
            if not isinstance(place, int) and (path in Path(place).parents or (itself and Path(place) == path)):
                raise OSError(number, os.strerror(number), str(place))
            return original(place, *arguments, **options)

        patch.setattr(owner, name, call)

    for owner, name in ((builtins, "open"), (Path, "open"), (os, "open"), (os, "listdir"), (os, "scandir")):
        refuse(owner, name, itself=True)
    for owner, name in ((Path, "stat"), (os, "lstat")):
        refuse(owner, name, itself=False)
