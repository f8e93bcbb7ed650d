"""After each single call of a save the power goes, and what was not fsynced with it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import Call, Disk, Folder, Tree, put, recorded
from parts import MANIFEST, check_whole, manager, save
from trial_log import Trial, TrialLog

from bigincubate.errors import ArtifactError, DamagedError
from bigincubate.files import read_json, write_json
from bigincubate.storage.artifacts import load_artifact, save_artifact

Found = Callable[[Path], Any]
STEPS = (4, 8, 12, 16)


def checkpoints(root: Path, mark: Callable[[Any], None]) -> None:
    saves = manager(root)
    for step in STEPS:
        mark(("begin", step))
        save(saves, step)
        mark(("end", step))


def newest(root: Path) -> int | None:
    """And what is saved next is there next."""
    found = check_whole(manager(root).load_latest())
    again = manager(root)
    save(again, 24)
    assert check_whole(manager(root).load_latest()) == 24
    assert not list(again.folder.glob(".saving-*"))
    return found


def artifacts(root: Path, mark: Callable[[Any], None]) -> None:
    for number in (1, 2, 3):
        mark(("begin", number))
        save_artifact(root / "phase" / "artifact", {"w": torch.full((3,), float(number))}, MANIFEST)
        mark(("end", number))


def artifact(root: Path) -> int | None:
    found = None
    with suppress(ArtifactError):
        found = int(load_artifact(root / "phase" / "artifact")[0]["w"].unique().item())
    save_artifact(root / "phase" / "artifact", {"w": torch.full((3,), 9.0)}, MANIFEST)
    assert [path.name for path in (root / "phase").iterdir()] == ["artifact"]
    return found


def results(root: Path, mark: Callable[[Any], None]) -> None:
    for number in (1, 2):
        mark(("begin", number))
        write_json(root / "phase" / "DONE", {"number": number})
        mark(("end", number))


def result(root: Path) -> int | None:
    file = root / "phase" / "DONE"
    return json.loads(file.read_text())["number"] if file.exists() else None


WORK: list[tuple[Callable[[Path, Callable[[Any], None]], None], Found]] = [
    (checkpoints, newest),
    (artifacts, artifact),
    (results, result),
]


def allowed(calls: list[Call]) -> set[int | None]:
    """N−1 or N while N is written, N once that has returned."""
    states: set[int | None] = {None}
    last: int | None = None
    for kind, *what in calls:
        if kind == "mark":
            moment, number = what[0]
            states = {last, number} if moment == "begin" else {number}
            last = number if moment == "end" else last
    return states


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where thousands of small trees cost little: in memory, if there is some."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def cut_everywhere(trial: Trial, root: Path, scratch: Path) -> None:
    work, found = WORK[trial.number]
    with recorded(root) as calls:
        work(root, lambda what: calls.append(("mark", what)))
    disk, seen = Disk(), set[tuple[str, str]]()
    for moment in range(len(calls) + 1):
        if moment:
            disk.perform(calls[moment - 1])
        expected = allowed(calls[:moment])
        for tree in disk.cuts():
            if (name := (repr(tree), repr(expected))) in seen:
                continue
            seen.add(name)
            place = scratch / str(len(seen))
            put(tree, place)
            try:
                state = found(place)
            except DamagedError as error:
                raise AssertionError(f"after {calls[:moment][-3:]}: {error}") from None
            assert state in expected, (state, expected, calls[max(0, moment - 4) : moment], shape(tree))
            shutil.rmtree(place)
    trial.note(moments=len(calls), disk_states=len(seen))


def shape(tree: Tree) -> Any:
    return {name: shape(node) if isinstance(node, dict) else len(node) for name, node in tree.items()}


@pytest.mark.scenario("crash")
def test_power_cut_after_every_call(
    trial_log: TrialLog, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            root = tmp_path / str(trial.number)
            root.mkdir()
            cut_everywhere(trial, root, scratch)
    trial_log.check()


def test_layer_records_calls_and_loses_unsynced_data(tmp_path: Path) -> None:
    """The judge is judged: a writer that forgets one fsync is found out."""
    with recorded(tmp_path) as calls:
        (tmp_path / "new").write_text("content")
        os.replace(tmp_path / "new", tmp_path / "file")
    assert [call[0] for call in calls] == ["create", "write", "move"]
    disk = Disk()
    for call in calls:
        disk.perform(call)
    states = {json.dumps({name: data.decode() for name, data in tree.items()}) for tree in disk.cuts()}
    assert {"{}", '{"file": ""}', '{"file": "con"}', '{"file": "content"}', '{"new": ""}'} <= states
    assert isinstance(disk.root, Folder)
    with recorded(tmp_path) as calls:
        write_json(tmp_path / "file", {"number": 1})
    kinds = [call[0] for call in calls]
    assert kinds == ["create", "write", "sync", "move", "sync"]
    disk = Disk()
    for call in calls:
        disk.perform(call)
    assert list(disk.cuts()) == [{"file": b'{\n "number": 1\n}\n'}] * len(list(disk.cuts()))
    assert read_json(tmp_path / "file") == {"number": 1}
