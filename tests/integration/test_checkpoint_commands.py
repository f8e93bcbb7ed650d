"""`bigincubate checkpoint list|verify|convert|prune`: told as it is, rewritten with the same bits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denied import deny
from forked import run
from records import make_plan
from safetensors.torch import load_file
from torch import Tensor

from bigincubate.distributed.process_group import DistributedContext
from bigincubate.files import write_and_hash
from bigincubate.storage.checkpoint_manager import CheckpointManager, commit_checkpoint
from bigincubate.storage.checkpoint_tools import convert_checkpoint, list_checkpoints, prune_checkpoints
from bigincubate.storage.checkpoint_verification import verify_checkpoint
from bigincubate.storage.lease import acquire_lease
from bigincubate.storage.sharded_tensors import ShardedTensorReader, TensorShard, copy_to_cpu, write_sharded_tensors

Harnesses = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(harness: Harnesses) -> Any:
    """A meta model and a module, twelve steps each, saved at 8 and 12."""
    made = harness("optim.name=lamb")
    made.train("pretrain")
    made.train("incubate", 1)
    return made


@pytest.fixture
def mine(trained: Any, tmp_path: Path) -> Any:
    return trained.copy(tmp_path / "run")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def step(harness: Any, number: int, part: str = "meta") -> Path:
    return harness.run.path / part / "checkpoints" / f"step-{number:08d}"


# ------------------------------------------------------------------------------------------------ list


def test_list_shows_the_state_of_each_checkpoint(mine: Any) -> None:
    flip_a_bit(step(mine, 8) / "rank-00000.safetensors")
    (step(mine, 12, "modules/01") / "COMMITTED").unlink()
    (mine.run.path / "meta" / "checkpoints" / ".saving-00000016-abc").mkdir()
    listed = run("checkpoint", "list", mine.run.path, "--json")
    assert (listed.wait(), listed.err) == (0, "")
    rows = json.loads(listed.out)
    found = [(Path(row["path"]).parts[-3], row["step"], row["committed"], row["problem"] is None) for row in rows]
    assert found == [
        ("meta", 8, True, False),
        ("meta", 12, True, True),
        ("meta", 16, False, False),
        ("01", 8, True, True),
        ("01", 12, False, False),
    ]
    for row in rows:
        files = list(Path(row["path"]).iterdir())
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        assert row["ranks"] == (1 if files else 0)
        assert row["time"] == pytest.approx(Path(row["path"]).stat().st_mtime)
    table = run("checkpoint", "list", mine.run.path)
    assert (table.wait(), table.err) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in table.out.splitlines() if "step-" in line}
    assert [lines[str(step(mine, number))][0] for number in (8, 12)] == ["8", "12"]
    assert [lines[str(step(mine, number))][3:5] for number in (8, 12)] == [["yes", "damaged"], ["yes", "yes"]]
    assert lines[str(step(mine, 12, "modules/01"))][3:5] == ["no", "-"]


def test_list_takes_a_phase_or_one_checkpoint(mine: Any) -> None:
    def steps(folder: Path) -> list[int]:
        return [row["step"] for row in list_checkpoints(folder)]

    phase = mine.run.path / "modules" / "01"
    assert steps(phase) == steps(phase / "checkpoints") == [8, 12]
    assert steps(phase / "checkpoints" / "step-00000012") == [12]


def test_steps_are_in_numeric_order(tmp_path: Path) -> None:
    checkpoints = CheckpointManager.open(tmp_path / "checkpoints", DistributedContext(), digest="d")
    for number in (100_000_000, 99_999_999):
        checkpoints.save(number, {"w": torch.ones(2)}, {})
        (checkpoints.folder / f"step-{number:08d}").rename(tmp_path / f"step-{number:08d}")
    assert [row["step"] for row in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]


# ------------------------------------------------------------------------------------------------ verify


def test_verify_of_valid_checkpoints_succeeds(mine: Any) -> None:
    verified = run("checkpoint", "verify", mine.run.path)
    assert (verified.wait(), verified.err) == (0, "")
    phases = ("meta", "modules/01")
    assert verified.out.splitlines() == [
        f"valid  {step(mine, number, phase)}" for phase in phases for number in (8, 12)
    ]


def test_verify_names_each_damaged_checkpoint(mine: Any) -> None:
    flip_a_bit(step(mine, 8) / "rank-00000.safetensors")
    flip_a_bit(step(mine, 12) / "state.json")
    verified = run("checkpoint", "verify", mine.run.path)
    assert verified.wait() == 6
    assert verified.err.startswith("bigincubate: damaged: 2 of 4 checkpoints: ")
    assert verified.err.count("\n") == 1
    for file in (step(mine, 8) / "rank-00000.safetensors", step(mine, 12) / "state.json"):
        expected = json.loads((file.parent / "manifest.json").read_text())["files"][file.name]["sha256"]
        found = verified.err.partition(f"{file}: SHA-256 ")[2]
        assert f"expected {expected[:12]}" in found
        assert not found.startswith(expected[:12])
    assert verified.out.count("valid") == 2
    assert run("checkpoint", "verify", step(mine, 12, "modules/01")).wait() == 0


# ------------------------------------------------------------------------------------------------ convert

LOGICAL: dict[str, Tensor] = {
    "model/matrix": torch.randn(7, 3),
    "model/vector": torch.randn(5).bfloat16(),
    "optim/step/matrix": torch.tensor(4.0),
    "number/group/step/0": torch.tensor(2**53 + 1),
    "model/four": torch.randn(2, 2, 1, 3).half(),
}


def spread(folder: Path, world: int) -> Path:
    """A checkpoint of ``world`` ranks, each with rows of the matrix; rank 0 with the rest, which all repeat."""
    aside = folder / "aside"
    aside.mkdir(parents=True)
    files = {}
    for rank in range(world):
        rows = LOGICAL["model/matrix"].tensor_split(world)
        shard = TensorShard(rows[rank], 3 * sum(len(part) for part in rows[:rank]), (7, 3))
        rest = {key: value for key, value in LOGICAL.items() if rank == 0 or key == "model/vector"}
        name = f"rank-{rank:05d}.safetensors"
        files[name] = write_sharded_tensors(aside / name, copy_to_cpu({**rest, "model/matrix": shard}))
    files["state.json"] = write_and_hash(aside / "state.json", [b'{"step": 4}'])
    commit_checkpoint(aside, folder / "step-00000004", step=4, digest="d", world=world, files=files)
    return folder / "step-00000004"


def tensors_of(folder: Path) -> ShardedTensorReader:
    return ShardedTensorReader(sorted(folder.glob("*.safetensors")))


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and found[key].shape == value.shape and torch.equal(found[key], value)
        for key, value in expected.items()
    )


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4, 30])
def test_convert_keeps_bits_dtypes_and_shapes(world: int, ranks: int, tmp_path: Path) -> None:
    source, out = spread(tmp_path, world), tmp_path / "deep" / "converted"
    convert_checkpoint(source, out, ranks=ranks)
    assert verify_checkpoint(out) is None
    assert same(dict(tensors_of(out)), LOGICAL)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["step"], manifest["digest"], manifest["world"]) == (4, "d", ranks)
    assert (out / "state.json").read_bytes() == (source / "state.json").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["converted"]
    sizes = [
        tensor.numel() for file in sorted(out.glob("rank*")) for key, tensor in load_file(file).items() if "ma" in key
    ]
    assert sum(sizes) == 21 + 1  # no element twice
    assert max(sizes) == -(-21 // ranks)
    assert verify_checkpoint(source) is None


def test_converted_file_needs_safetensors_alone(tmp_path: Path) -> None:
    convert_checkpoint(spread(tmp_path, 3), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.suffix == ".safetensors") == [
        "rank-00000.safetensors"
    ]
    assert same(load_file(tmp_path / "out" / "rank-00000.safetensors"), LOGICAL)


def test_phase_resumes_to_the_bit_from_a_converted_checkpoint(mine: Any, trained: Any, tmp_path: Path) -> None:
    folder = mine.run.phase("incubate", 1)
    for path in (folder.artifact, step(mine, 12, "modules/01")):
        shutil.rmtree(path)
    (folder.path / "DONE").unlink()
    original = step(mine, 8, "modules/01")
    converted = run("checkpoint", "convert", original, tmp_path / "three", "--ranks", 3)
    assert converted.wait() == 0, converted.err
    assert converted.out == f"{tmp_path / 'three'}: converted from {original} to 3 files\n"
    shutil.rmtree(original)
    (tmp_path / "three").rename(original)
    mine.train("incubate", 1)
    assert [row["step"] for row in mine.log("incubate", 1)] == [2, 4, 6, 8, 10, 12]
    assert len(folder.read_attempts()) == 2
    assert same(mine.weights("incubate", 1), trained.weights("incubate", 1))
    assert same(dict(tensors_of(step(mine, 12, "modules/01"))), dict(tensors_of(step(trained, 12, "modules/01"))))


def test_convert_unpickles_nothing_and_starts_no_process_group(tmp_path: Path) -> None:
    source = spread(tmp_path, 3)
    for words in (["list", tmp_path], ["verify", source], ["convert", source, tmp_path / "out"]):
        ended = run("checkpoint", *words, before=no_pickles)
        assert ended.wait() == 0, ended.err


def no_pickles() -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for owner, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            setattr(owner, name, die)
    torch.distributed.init_process_group = die


def test_failed_conversion_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = spread(tmp_path, 3)
    opened = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if path.name == "state.json" and "w" in mode:
            raise OSError(28, "No space left on device", str(path))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert verify_checkpoint(source) is None


# ------------------------------------------------------------------------------------------------ prune


def test_prune_removes_old_damaged_and_unfinished_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "meta" / "checkpoints"
    checkpoints = CheckpointManager.open(folder, DistributedContext(), digest="d", keep=9)
    for number in (4, 8, 12, 16, 20):
        checkpoints.save(number, LOGICAL, {"step": number})
    flip_a_bit(folder / "step-00000020" / "rank-00000.safetensors")
    (folder / ".saving-00000024-abc").mkdir()
    pruned = run("checkpoint", "prune", tmp_path, "--keep", 2)
    assert (pruned.wait(), pruned.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000012", "step-00000016"]
    assert sorted(line.split()[-1] for line in pruned.out.splitlines()) == sorted(
        str(folder / name) for name in ("step-00000004", "step-00000008", "step-00000020", ".saving-00000024-abc")
    )
    assert run("checkpoint", "prune", tmp_path).out == "nothing to remove\n"
    assert same(dict(tensors_of(folder / "step-00000016")), LOGICAL)


@pytest.mark.parametrize(("phase", "module", "folder"), [("pretrain", None, "meta"), ("incubate", 1, "modules/01")])
def test_prune_keeps_the_checkpoint_before_the_decay(
    tmp_path: Path, phase: str, module: int | None, folder: str
) -> None:
    """Forks of a run share the steps before a decay, so they start from that checkpoint."""
    plan = make_plan("pretrain", "incubate/1", stable_steps=4)
    (row,) = [row for row in plan["rows"] if (row["phase"], row["module"]) == (phase, module)]
    row["stable_steps"] = 8
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    checkpoints = CheckpointManager.open(tmp_path / folder / "checkpoints", DistributedContext(), digest="d", keep=9)
    for number in (4, 8, 12, 16):
        checkpoints.save(number, LOGICAL, {"step": number})
    for path in (tmp_path, tmp_path / folder):
        assert run("checkpoint", "prune", path, "--keep", 1).wait() == 0
        assert [row["step"] for row in list_checkpoints(path)] == [8, 16]


def test_prune_keeps_everything_if_all_are_damaged(mine: Any) -> None:
    for number in (8, 12):
        flip_a_bit(step(mine, number) / "state.json")
    pruned = run("checkpoint", "prune", mine.run.path, "--keep", 1)
    assert pruned.wait() == 6
    assert pruned.err == (
        f"bigincubate: every checkpoint is damaged in {mine.run.path / 'meta' / 'checkpoints'};"
        " these were not removed\n"
    )
    assert [row["step"] for row in list_checkpoints(mine.run.path)] == [8, 12, 12]  # of the module, the newest


def test_checkpoint_that_cannot_be_read_is_neither_pruned_nor_called_damaged(
    mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, step(mine, 12) / "rank-00000.safetensors")
    with pytest.raises(PermissionError):
        prune_checkpoints(mine.run.path / "meta", keep=1)
    with pytest.raises(PermissionError):
        convert_checkpoint(step(mine, 12), tmp_path / "out")
    monkeypatch.undo()
    assert [row["problem"] for row in list_checkpoints(mine.run.path / "meta")] == [None, None]


def test_prune_leaves_a_phase_in_training_alone(mine: Any) -> None:
    with acquire_lease(mine.run.path / "meta", DistributedContext()):
        pruned = run("checkpoint", "prune", mine.run.path, "--keep", 1)
        assert pruned.wait() == 7
        assert f"process {os.getpid()} on" in pruned.err
    assert [row["step"] for row in list_checkpoints(mine.run.path / "meta")] == [8, 12]


def test_prune_refuses_a_single_checkpoint(mine: Any) -> None:
    pruned = run("checkpoint", "prune", step(mine, 8))
    assert (pruned.wait(), step(mine, 8).exists()) == (2, True)
    assert "give a run directory" in pruned.err
