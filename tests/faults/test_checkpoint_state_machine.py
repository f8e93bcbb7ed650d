"""Random histories of saves, power cuts, restarts and damage: the newest valid checkpoint is never gone."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import Disk, Folder, put, recorded
from parts import check_whole, manager, save
from trial_log import Trial, TrialLog

from bigincubate.errors import DamagedError
from bigincubate.storage.checkpoint_verification import verify_checkpoint


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def loaded(tree: dict[str, Any]) -> Folder:
    """A folder that is on the disk, all of it."""
    from disk import Data

    folder = Folder()
    for name, node in tree.items():
        folder.now[name] = loaded(node) if isinstance(node, dict) else Data(node, len(node))
    folder.sync()
    return folder


def content(folder: Path) -> dict[str, Any]:
    return {path.name: content(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def valid(root: Path) -> list[int]:
    folders = sorted((root / "checkpoints").glob("step-*"))
    return [int(folder.name[5:]) for folder in folders if verify_checkpoint(folder) is None]


class History:
    """A phase's folder, and what must be found there: any of ``must``, or nothing at all where that holds None."""

    def __init__(self, place: Path, dice: random.Random) -> None:
        self.place, self.dice, self.versions = place, dice, 0
        self.root = place / "0"
        self.root.mkdir(parents=True)
        self.must: set[int | None] = {None}
        self.keep, self.step = dice.choice([2, 2, 3]), 0
        self.lost = False  # all that there was has been damaged
        self.start()

    def start(self) -> None:
        """A new process."""
        before = valid(self.root)
        self.saves = manager(self.root, keep=self.keep)
        assert set(before) <= set(valid(self.root))
        try:
            found = check_whole(self.saves.load_latest())
        except DamagedError:
            assert self.lost
            shutil.rmtree(self.saves.folder)  # as the message says
            self.must, self.lost, self.step = {None}, False, 0
            return self.start()
        assert found in self.must, (found, self.must)
        self.must, self.step = {found}, found or 0
        return None

    def save(self) -> None:
        self.step += self.dice.randrange(1, 5)
        save(self.saves, self.step)
        self.must, self.lost = {self.step}, False

    def cut(self) -> None:
        """The power goes while it saves, or just after."""
        disk, last = Disk(), next(iter(self.must))
        disk.root = loaded(content(self.root))
        step = self.step + self.dice.randrange(1, 5)
        with recorded(self.root) as calls:
            save(self.saves, step)
        moment = self.dice.randrange(len(calls) + 1)
        for call in calls[:moment]:
            disk.perform(call)
        self.must = {step} if moment == len(calls) else {last, step}
        shutil.rmtree(self.root)
        self.versions += 1
        self.root = self.place / str(self.versions)
        put(next(disk.cuts(self.dice)), self.root)
        self.start()

    def damage(self) -> None:
        """Of the newest checkpoint, while nothing runs."""
        steps = valid(self.root)
        if not steps:
            return
        file = self.dice.choice(sorted((self.saves.folder / f"step-{steps[-1]:08d}").iterdir()))
        data = bytearray(file.read_bytes())
        data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        file.write_bytes(data)
        self.must = {steps[-2] if len(steps) > 1 else None}
        self.lost = len(steps) == 1
        self.start()


@pytest.mark.scenario("history")
def test_newest_valid_checkpoint_is_never_lost(
    trial_log: TrialLog, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            live(trial, scratch / str(trial.number))
        shutil.rmtree(scratch / str(trial.number), ignore_errors=True)
    trial_log.check()


def live(trial: Trial, place: Path) -> None:
    history = History(place, trial.random)
    acts = trial.random.choices(["save", "cut", "start", "damage"], weights=[4, 4, 1, 2], k=10)
    for act in acts:
        getattr(history, act)()
    trial.note(saves=acts.count("save"), power_cuts=acts.count("cut"), damaged=acts.count("damage"))
