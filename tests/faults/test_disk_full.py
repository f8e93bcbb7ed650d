"""A disk that is full, a quota that is used up, a device that fails: at every stage of a save."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk import Call, recorded
from parts import check_whole, manager, save
from trial_log import TrialLog

from bigincubate.errors import SystemResourceError
from bigincubate.storage.checkpoint_verification import verify_checkpoint

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
SMALL = 256 * 1024  # bytes of the small file system


class Failing:
    """Lets calls through, all but one."""

    def __init__(self, moment: int, number: int, root: Path) -> None:
        self.left, self.number, self.root, self.call = moment, number, root, ("none", "")

    def __call__(self, call: Call) -> None:
        if call[0] == "mkdir" and (self.root / call[1]).exists():
            return  # it would have done nothing
        self.left -= 1
        if self.left == 0:
            self.call = call[:2]
            raise OSError(self.number, os.strerror(self.number), str(self.root / call[1]))


def fail_everywhere(folder: Path, number: int) -> int:
    """Each call of a save (the third, which prunes) fails once. Gives how many there were."""
    moment = 0
    while True:
        moment += 1
        root = folder / f"{number}-{moment}"
        root.mkdir()
        saves = manager(root)
        for step in (4, 8):
            save(saves, step)
        failing = Failing(moment, number, root)
        with recorded(root, failing):
            try:
                save(saves, 12)
                problem = None
            except SystemResourceError as fault:
                problem = str(fault)
        if failing.left > 0:
            assert problem is None
            return moment - 1
        where = (failing.call, problem)
        assert problem is not None, where
        assert problem.startswith("checkpoint of step 12 not written: ") or failing.call[0] == "drop", where
        assert str(root) in problem, where
        assert "\n" not in problem
        assert ("bytes free" in problem) == (number != errno.EIO), where
        assert verify_checkpoint(saves.folder / "step-00000008") is None, where
        assert check_whole(manager(root).load_latest()) in (8, 12), where
        save(saves, 13)
        assert check_whole(manager(root).load_latest()) == 13, where
        shutil.rmtree(root)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path | None]:
    """A file system that is soon full; None where none can be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(small: Path) -> int:
    """Checkpoints that grow until one does not fit. Gives how many did not."""
    saves = manager(small)
    save(saves, 4, 1000)
    refused = 0
    for step, size in ((8, 40_000), (9, 60_000), (10, 10_000)):
        try:
            save(saves, step, size)
            continue
        except SystemResourceError as fault:
            said = str(fault)
        refused += 1
        for part in ("No space left on device", f"{small}/checkpoints/.saving-", "bytes free"):
            assert part in said
        assert verify_checkpoint(saves.folder / "step-00000008") is None
    assert refused == 1
    assert check_whole(manager(small).load_latest()) == 10
    return refused


@pytest.mark.scenario("disk")
def test_failing_disk_loses_nothing(trial_log: TrialLog, tmp_path: Path, small: Path | None) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            calls = sum(fail_everywhere(tmp_path, number) for number in ERRORS)
            trial.note(failed_calls=calls, full_disks=fill(small) if small else 0)
    trial_log.check()
