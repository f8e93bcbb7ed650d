"""`data prepare` on a disk without file locks or hard links, as some parallel file systems are."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import FORK, contents, small_chunks, tree

from bigincubate.data.dataset import open_dataset
from bigincubate.data.partitions import partition_by_class
from bigincubate.data.prepare import prepare_dataset
from bigincubate.files import write_text

fixtures = (tree, small_chunks)
IN_TWO = partial(partition_by_class, parts=2)


def refuse_on(
    monkeypatch: pytest.MonkeyPatch, disk: Path, code: int, *, locks: bool = False, links: bool = False
) -> None:
    """Let the file system of ``disk`` answer file locks or hard links with an error; other disks are not affected."""
    flock, link = fcntl.flock, os.link

    def no_flock(descriptor: Any, operation: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if os.readlink(f"/proc/self/fd/{number}").startswith(str(disk)):
            raise OSError(code, os.strerror(code))
        flock(descriptor, operation)

    def no_link(source: Any, target: Any, **options: Any) -> None:
        if os.fspath(target).startswith(str(disk)):
            raise OSError(code, os.strerror(code))
        link(source, target, **options)

    if locks:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    if links:
        monkeypatch.setattr(os, "link", no_link)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.EPERM])
def test_data_is_prepared_without_file_locks(
    tree: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare_dataset(str(tree), tmp_path / "elsewhere")
    refuse_on(monkeypatch, tmp_path / "disk", code, locks=True)
    assert prepare_dataset(str(tree), tmp_path / "disk" / "out").digest == expected.digest
    assert contents(tmp_path / "disk" / "out") == contents(tmp_path / "elsewhere")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/disk: the file system has no file locks; using a lease instead"
    ]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM])
def test_partitions_are_copied_without_hard_links(
    tree: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_dataset(str(tree), tmp_path / "elsewhere", partition=IN_TWO)
    assert caplog.records == []
    refuse_on(monkeypatch, tmp_path / "disk", code, links=True, locks=True)  # the lease needs no hard links either
    prepare_dataset(str(tree), tmp_path / "disk" / "out", partition=IN_TWO)
    assert contents(tmp_path / "disk" / "out") == contents(tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "disk" / "out" / "parts" / "01").part == 1
    assert "no hard links; the partitions are copies" in caplog.text
    assert {file.stat().st_nlink for file in (tmp_path / "disk" / "out").rglob("*.mds")} == {1}


def _prepare_and_tell(source: str, out: Path, tell: Any) -> None:
    seen: list[int] = []
    info = prepare_dataset(source, out, on_progress=lambda done, _: seen.append(done))
    tell.put((info.digest, len(seen)))


def test_second_preparation_waits_for_the_lease_of_the_first(
    tree: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_on(monkeypatch, tmp_path, errno.ENOTSUP, locks=True, links=True)
    tell = FORK.Queue()
    both = [FORK.Process(target=_prepare_and_tell, args=(str(tree), tmp_path / "out", tell)) for _ in range(2)]
    for process in both:
        process.start()
    told = [tell.get(timeout=60) for _ in both]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len({digest for digest, _ in told}) == 1
    assert sorted(steps for _, steps in told)[0] == 0  # it found the data prepared


def test_lease_of_a_killed_preparation_is_taken_over(
    tree: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_after_the_first_chunk(done: int, total: int) -> None:
        if done:
            os.kill(os.getpid(), signal.SIGKILL)

    refuse_on(monkeypatch, tmp_path, errno.ENOLCK, locks=True)
    options = {"jobs": 2, "on_progress": die_after_the_first_chunk}
    child = FORK.Process(target=prepare_dataset, args=(str(tree), tmp_path / "out"), kwargs=options)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    digest = prepare_dataset(str(tree), tmp_path / "out").digest
    monkeypatch.undo()
    assert open_dataset(tmp_path / "out").digest == digest


def test_exclusive_write_without_hard_links_keeps_an_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_on(monkeypatch, tmp_path, errno.EPERM, links=True)
    assert write_text(tmp_path / "file", "first", exclusive=True)
    assert not write_text(tmp_path / "file", "second", exclusive=True)
    assert (tmp_path / "file").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
