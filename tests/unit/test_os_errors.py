"""What messages say about errors of the operating system, and what a user can do about them."""

from __future__ import annotations

import errno
import os
import ssl
from pathlib import Path

import pytest

from bigincubate.errors import describe_solution, format_os_error


def error_of(number: int, *names: object) -> OSError:
    files = [str(names[0]), None, str(names[1])] if len(names) > 1 else [*map(str, names)]
    return OSError(number, os.strerror(number), *files)


def test_permissions_are_those_of_the_file_or_of_the_folder_that_it_would_be_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert describe_solution(error_of(errno.EACCES, tmp_path / "file")) == "change its permissions"
    missing = tmp_path / "new" / "run"
    assert describe_solution(error_of(errno.EACCES, missing)) == f"change the permissions of {tmp_path}"
    assert describe_solution(error_of(errno.EPERM)) == "change the permissions"


@pytest.mark.parametrize(
    ("number", "solution"),
    [
        *((number, "free some disk space") for number in (errno.ENOSPC, errno.EDQUOT)),
        *((number, "check the disk or the network file system") for number in (errno.EIO, errno.ESTALE)),
        (errno.ENOENT, ""),
    ],
)
def test_solution_follows_from_the_error(number: int, solution: str) -> None:
    assert describe_solution(error_of(number, "file")) == solution


def test_error_of_another_library_is_not_a_permission_error() -> None:
    error = ssl.SSLError(1, "wrong version number")
    assert error.errno == errno.EPERM
    assert describe_solution(error) == ""


def test_error_of_a_copy_or_rename_is_that_of_its_target() -> None:
    assert format_os_error(error_of(errno.ENOSPC, "from", "to")) == "to: No space left on device"
    denied = error_of(errno.EACCES, "/tmp/from", "/runs/export/to")
    assert format_os_error(denied) == "/runs/export/to: Permission denied"
    assert describe_solution(denied) == "change the permissions of /runs/export"


def test_folder_of_a_relative_path_is_not_guessed() -> None:
    """`shutil.rmtree` names files relative to the folder that it has opened."""
    assert describe_solution(error_of(errno.EACCES, "state.json")) == "change the permissions"
