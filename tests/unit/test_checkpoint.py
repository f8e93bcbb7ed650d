"""Checkpoints: committed or not there, verified before they are read, in numeric order, never half removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denied import deny
from parts import MANIFEST
from torch import Tensor

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ArtifactError, DamagedError, SystemResourceError
from bigincubate.storage import artifacts as store
from bigincubate.storage.artifacts import Lineage, check_artifact_lineage, load_artifact, save_artifact
from bigincubate.storage.checkpoint_manager import CheckpointManager
from bigincubate.storage.checkpoint_verification import verify_checkpoint
from bigincubate.storage.sharded_tensors import ShardedTensorReader, copy_to_cpu, write_sharded_tensors


def manager(folder: Path, keep: int = 2, digest: str = "d" * 64) -> CheckpointManager:
    return CheckpointManager.open(folder / "checkpoints", DistributedContext(), digest=digest, keep=keep)


def tensors(step: int) -> dict[str, Tensor]:
    return {"model/w": torch.full((3, 2), float(step)), "optim/step/w": torch.tensor(step)}


def saved(folder: Path, *steps: int, keep: int = 2) -> CheckpointManager:
    checkpoints = manager(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors(step), {"step": step})
    return checkpoints


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_saved_state_is_loaded_again(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    checkpoint = manager(tmp_path).load_latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (7, {"step": 7})
    assert checkpoint.tensors.keys() == tensors(7).keys()
    assert all(torch.equal(checkpoint.tensors[key], value) for key, value in tensors(7).items())


def test_missing_checkpoint_is_none(tmp_path: Path) -> None:
    assert manager(tmp_path).load_latest() is None


def test_newest_checkpoint_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 99_999_998, 99_999_999, 100_000_000)
    assert checkpoints.committed_steps() == [99_999_999, 100_000_000]  # and the oldest went
    newest = manager(tmp_path).load_latest()
    assert newest is not None
    assert newest.step == 100_000_000


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, keep=3)
    assert checkpoints.committed_steps() == [3, 4, 5]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step-{step:08d}" for step in (3, 4, 5)]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "manifest.json", "COMMITTED"])
def test_flipped_bit_anywhere_is_named_and_the_one_before_is_used(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 4, 8)
    flip_a_bit(checkpoints.folder / "step-00000008" / name)
    newest = manager(tmp_path).load_latest()
    assert newest is not None
    assert newest.step == 4
    said = caplog.text
    assert "step-00000008" in said
    assert ("manifest.json" if name == "COMMITTED" else name) in said
    assert "expected" in said


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "rank-00000.safetensors").unlink(),
        lambda folder: (folder / "rank-00000.safetensors").write_bytes(b""),
        lambda folder: (folder / "COMMITTED").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "COMMITTED").write_text(""),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
    ids=["missing tensors", "empty tensors", "marker not text", "empty marker", "no manifest"],
)
def test_damage_of_other_kinds_is_found(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, 4).folder / "step-00000004"
    assert verify_checkpoint(folder) is None
    spoil(folder)
    assert "step-00000004" in str(verify_checkpoint(folder))


def test_damage_of_every_checkpoint_is_an_error_of_its_own(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 4, 8)
    for step in checkpoints.committed_steps():
        flip_a_bit(checkpoints.folder / f"step-{step:08d}" / "rank-00000.safetensors")
    with pytest.raises(DamagedError, match=r"every checkpoint in .* is damaged") as caught:
        manager(tmp_path).load_latest()
    assert caught.value.code == 6


@pytest.mark.parametrize("denied", ["", "step-00000008", "step-00000008/rank-00000.safetensors"])
def test_checkpoint_that_cannot_be_read_is_neither_skipped_nor_removed(
    denied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 4, 8).folder
    deny(monkeypatch, folder / denied)
    with pytest.raises(SystemResourceError, match=r"Permission denied; make the checkpoint readable") as caught:
        manager(tmp_path).load_latest()
    assert str(folder / denied) in str(caught.value)
    assert caught.value.code == 3
    monkeypatch.undo()
    newest = manager(tmp_path).load_latest()
    assert newest is not None
    assert newest.step == 8


def test_checkpoint_on_a_bad_block_is_skipped_if_an_earlier_one_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 4, 8).folder
    deny(monkeypatch, folder / "step-00000008" / "rank-00000.safetensors", errno.EIO)
    resumed = manager(tmp_path)
    newest = resumed.load_latest()
    assert newest is not None
    assert newest.step == 4
    resumed._prune(6)
    assert resumed.committed_steps() == [4, 8]  # the error may be temporary
    resumed._prune(12)
    assert resumed.committed_steps() == [4, 8]
    deny(monkeypatch, folder / "step-00000004" / "rank-00000.safetensors", errno.EIO)
    with pytest.raises(SystemResourceError, match=r"step-00000004.*: Input/output error; make the checkpoint read"):
        manager(tmp_path).load_latest()


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.touch, lambda path: path.symlink_to(path)],
    ids=["pipe", "file", "loop"],
)
def test_what_has_the_name_of_a_checkpoint_but_is_none_is_removed(make: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, 4).folder
    make(folder / "step-00000008")
    opened = CheckpointManager.open(folder, DistributedContext(), digest="d" * 64, keep=2)
    newest = opened.load_latest()
    assert newest is not None
    assert newest.step == 4
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


def test_checkpoint_without_its_marker_is_not_there_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 4, 8)
    (checkpoints.folder / "step-00000008" / "COMMITTED").unlink()
    (checkpoints.folder / ".saving-00000012-abc").mkdir()
    again = manager(tmp_path)
    newest = again.load_latest()
    assert newest is not None
    assert newest.step == 4
    assert [path.name for path in again.folder.iterdir()] == ["step-00000004"]


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    with pytest.raises(ArtifactError, match="other settings, data, meta model or modules; remove"):
        manager(tmp_path, digest="e" * 64).load_latest()


def test_damaged_checkpoints_never_displace_a_valid_one(tmp_path: Path) -> None:
    """Training went back to step 4: what it saves from there counts, not the damaged ones beyond."""
    saved(tmp_path, 4, 8, 12, keep=3)
    for step in (8, 12):
        flip_a_bit(tmp_path / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    checkpoints = manager(tmp_path, keep=2)
    checkpoints.save(5, tensors(5), {"step": 5})
    assert checkpoints.committed_steps() == [4, 5]
    newest = manager(tmp_path).load_latest()
    assert newest is not None
    assert newest.step == 5


def test_damaged_checkpoint_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 4, 8)
    flip_a_bit(checkpoints.folder / "step-00000008" / "state.json")
    checkpoints.save(8, tensors(8), {"step": 8})
    assert verify_checkpoint(checkpoints.folder / "step-00000008") is None


def test_save_that_fails_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 4)

    def full(path: Path, *_: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(SystemResourceError, match=r"step 8 not written: .*No space left.*earlier checkpoints"):
        checkpoints.save(8, tensors(8), {"step": 8})
    monkeypatch.undo()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000004"]
    assert verify_checkpoint(checkpoints.folder / "step-00000004") is None


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is what the tensors were, although they change meanwhile; a second save waits for the first."""
    checkpoints, disk = manager(tmp_path), threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (disk.wait(), fsync(handle))[1])
    weights = torch.zeros(3)
    checkpoints.start_save(1, {"model/w": weights}, {"step": 1})
    weights += 1
    assert checkpoints.committed_steps() == []
    assert not checkpoints.failed
    threading.Timer(0.2, disk.set).start()
    checkpoints.start_save(2, {"model/w": weights}, {"step": 2})
    assert checkpoints.committed_steps()[0] == 1
    assert checkpoints.pop_metrics()["checkpoint/blocked_ms"] > 100  # the disk was slow
    checkpoints.wait()
    assert checkpoints.committed_steps() == [1, 2]
    for step in (1, 2):
        reader = ShardedTensorReader([checkpoints.folder / f"step-{step:08d}" / "rank-00000.safetensors"])
        assert torch.equal(reader["model/w"], torch.full((3,), float(step - 1)))


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = {
        "b": torch.tensor(True),
        "half": torch.randn(3, 5).bfloat16(),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2**40),
        "w": torch.randn(2, 3).t(),
    }
    entry = write_sharded_tensors(tmp_path / "file", copy_to_cpu(written))
    data = (tmp_path / "file").read_bytes()
    assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    found = load_file(tmp_path / "file")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


class Died(BaseException):
    """Stands for ``kill -9``: nothing that waits for it cleans up."""


def fail_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Die before the ``moment``-th call that changes the disk. Gives the calls."""
    calls: list[str] = []

    def dying(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == moment:
                raise Died
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "open"), (Path, "rename"), (Path, "unlink")):
        dying(owner, name)
    dying(shutil, "rmtree")
    return calls


def test_save_killed_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """Before each single call that changes the disk, until a save gets through."""
    moments = 0
    while True:
        moments += 1
        folder = tmp_path / str(moments)
        checkpoints = saved(folder, 4, 8)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, moments)
            try:
                checkpoints.save(12, tensors(12), {"step": 12})
                break
            except Died:
                pass
        newest = manager(folder).load_latest()
        assert newest is not None
        assert newest.step in (8, 12), calls
        assert torch.equal(newest.tensors["model/w"], tensors(newest.step)["model/w"])
        again = manager(folder)
        assert len(again.committed_steps()) >= 2, calls  # none goes before its successor is committed
        again.save(13, tensors(13), {"step": 13})
        assert len(again.committed_steps()) == 2
        assert len(list(again.folder.iterdir())) == 2, calls  # no litter
    assert moments > 10
    assert {"fsync", "rename", "unlink", "rmtree"} <= set(calls)


# ------------------------------------------------------------------------------------------------ artifacts

MODULE = MANIFEST.model_copy(update={"kind": "module", "phase": "incubate", "module": 0, "inputs": {"meta": "m" * 64}})


def test_artifact_comes_back_with_its_manifest(tmp_path: Path) -> None:
    written = save_artifact(tmp_path / "artifact", tensors(1), MANIFEST)
    read, manifest = load_artifact(tmp_path / "artifact")
    assert manifest == written
    assert len(manifest.digest) == 64
    assert all(torch.equal(read[key], value) for key, value in tensors(1).items())


def test_damaged_artifact_is_named(tmp_path: Path) -> None:
    save_artifact(tmp_path / "artifact", tensors(1), MANIFEST)
    flip_a_bit(tmp_path / "artifact" / store.WEIGHTS_FILE)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged: SHA-256 .* expected"):
        load_artifact(tmp_path / "artifact")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "cake"}', "\x00"])
def test_invalid_manifest_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    save_artifact(tmp_path / "artifact", tensors(1), MANIFEST)
    (tmp_path / "artifact" / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load_artifact(tmp_path / "artifact")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_artifact_or_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact in"):
        load_artifact(tmp_path / "nowhere")
    save_artifact(tmp_path / "artifact", tensors(1), MANIFEST)
    (tmp_path / "artifact" / store.WEIGHTS_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        load_artifact(tmp_path / "artifact")


def test_module_of_another_lineage_is_stale(tmp_path: Path) -> None:
    save_artifact(tmp_path / "artifact", tensors(1), MODULE)
    own = Lineage(MODULE.identity, MODULE.data, MODULE.inputs)
    assert check_artifact_lineage(tmp_path / "artifact", own) is None
    for changes, message in (
        ({"identity": {"steps": 1, "train.lr": 0.5}}, 'other settings (train.lr: "default" -> 0.5)'),
        ({"inputs": {"meta": "x" * 64}}, "another meta model (mmm"),
        ({"data": "x" * 64}, "another data (ddd"),
    ):
        problem = check_artifact_lineage(tmp_path / "artifact", replace(own, **changes))
        assert message in str(problem)


def test_new_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    save_artifact(tmp_path / "artifact", {"old": torch.zeros(1)}, MANIFEST)
    save_artifact(tmp_path / "artifact", {"new": torch.ones(1)}, MANIFEST)
    assert load_artifact(tmp_path / "artifact")[0].keys() == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact"]


def test_manifest_reads_as_plain_json(tmp_path: Path) -> None:
    save_artifact(tmp_path / "artifact", tensors(1), MODULE)
    plain = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert (plain["kind"], plain["module"], plain["weights"]) == ("module", 0, "raw")
