"""Untrusted files with the right hashes: no code of them runs, and they lead nowhere outside their folder."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trial_log import ROOT, TrialLog
from untrusted_checkpoints import CHECKPOINTS
from untrusted_common import Payload, torch_zip
from untrusted_inputs import ARTIFACTS, DATA, RECIPES, weights

from bigincubate.data.file_locks import runtime_dir
from bigincubate.errors import ArtifactError
from bigincubate.storage.artifacts import load_artifact

# ------------------------------------------------------------------------------------------------ the guard

FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
KNOWN = tuple({str(ROOT), sys.prefix, sys.base_prefix, *map(os.path.realpath, sys.path), "/proc", "/sys", "/dev/shm"})
KNOWN += (str(runtime_dir()),)  # locks of this user's
watch = SimpleNamespace(root=None, seen=[])


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if watch.root is None:
        return
    if event in FORBIDDEN:
        watch.seen.append((event, *map(str, arguments)))
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        allowed = path.startswith((str(watch.root), *filter(None, KNOWN))) or path.endswith("_filelock")
        if not allowed or "outside" in path:
            watch.seen.append((event, path))


@contextmanager
def guarded(root: Path) -> Iterator[list[Any]]:
    """What happens in the block that must not."""
    if "guard" not in vars(watch):
        watch.guard = guard
        sys.addaudithook(guard)  # for good: it cannot be taken away
    watch.root, watch.seen = os.path.realpath(root), []
    try:
        yield watch.seen
    finally:
        watch.root = None


KINDS = [*CHECKPOINTS, *ARTIFACTS, *DATA, *RECIPES]


@pytest.mark.scenario("untrusted")
def test_untrusted_file_runs_nothing_and_leads_nowhere(
    trial_log: TrialLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trial_log.scenario.full == trial_log.scenario.few == len(KINDS), len(KINDS)
    tensors = weights()
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            name, make, expected = KINDS[trial.number]
            top = tmp_path / str(trial.number)
            place = SimpleNamespace(inside=top / "inside", outside=top / "outside", mark=top / "ran", weights=tensors)
            place.inside.mkdir(parents=True), place.outside.mkdir()
            (place.outside / "evil.pth").write_bytes(torch_zip(place))
            read = make(place)
            before = sorted(place.outside.rglob("*"))
            with guarded(place.inside) as seen:
                found = outcome(read)
            assert isinstance(found, expected or type(None)), f"{name}: {found!r}"
            assert "\n" not in str(found), f"{name}: {found}"
            assert not seen, f"{name}: {seen}"
            assert not place.mark.exists(), name
            assert sorted(place.outside.rglob("*")) == before, name
    trial_log.check()


def outcome(read: Callable[[], Any]) -> BaseException | None:
    try:
        read()
    except Exception as error:
        return error
    return None


@pytest.fixture
def trainer(harness: Callable[..., Any]) -> Any:
    return harness().trainer("pretrain")


def test_checkpoint_with_right_hashes_that_does_not_fit_is_refused(trainer: Any) -> None:
    """What only the trainer can tell: values of the wrong type, tensors of the wrong shape, places that are not."""
    trainer.checkpoints.save(0, trainer.sharding.save() | trainer.ema.save(), {"step": 0})
    valid = trainer.checkpoints.load_latest()
    trainer.restore(valid)
    tensors = {key: valid.tensors[key] for key in valid.tensors}
    name = next(key for key in tensors if key.startswith("model/") and tensors[key].ndim == 2)
    damages: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"seen": "many"}, {}),
        ({"lr_hook": {"gain": [1]}}, {}),
        ({"last": 3}, {}),
        ({}, {name: torch.zeros(3, 3)}),
        ({}, {"group/step/99": torch.tensor(1)}),
        ({}, {"group/step/x": torch.tensor(1)}),
    ]
    for step, (state, own) in enumerate(damages, start=1):
        trainer.checkpoints.save(step, {**tensors, **own}, {**valid.state, "step": step, **state})
        with pytest.raises(ArtifactError, match="does not fit") as caught:
            trainer.restore(trainer.checkpoints.load_latest())
        assert "\n" not in str(caught.value)


def test_guard_sees_opened_files_and_unpickling(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with guarded(tmp_path / "inside") as seen:
        pickle.loads((tmp_path / "outside").read_bytes())
    assert [event for event, *_ in seen] == ["open", "pickle.find_class"]
    assert (tmp_path / "ran").exists()
    with pytest.raises(ArtifactError):
        load_artifact(tmp_path)
