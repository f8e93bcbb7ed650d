"""Bits that flip, pages that vanish, files that are short, missing or another's: found before a tensor is read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from parts import MANIFEST, manager
from trial_log import Trial, TrialLog

from bigincubate.errors import ArtifactError
from bigincubate.files import write_and_hash
from bigincubate.storage.artifacts import load_artifact, save_artifact
from bigincubate.storage.checkpoint_manager import commit_checkpoint
from bigincubate.storage.checkpoint_verification import verify_checkpoint
from bigincubate.storage.sharded_tensors import TensorShard, write_sharded_tensors

PAGE = 4096
Files = dict[Path, bytes]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Two checkpoints of two ranks, two artifacts: what is in each of their files."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints"
    for step in (4, 8):
        aside = folder / ".saving"
        aside.mkdir(parents=True)
        parts = {}
        for rank in range(2):
            name = f"rank-{rank:05d}.safetensors"
            parts[name] = write_sharded_tensors(
                aside / name, {"w": TensorShard(torch.randn(3000), 3000 * rank, (6000,))}
            )
        parts["state.json"] = write_and_hash(aside / "state.json", [b'{"step": %d}' % step])
        commit_checkpoint(aside, folder / f"step-{step:08d}", step=step, digest="d" * 64, world=2, files=parts)
    for name in ("one", "two"):
        save_artifact(tmp_path / name, {"w": torch.randn(3000)}, MANIFEST.model_copy(update={"phase": name}))
    found = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    assert len(found) == 16
    return found


def spoil(trial: Trial, files: Files) -> list[Path]:
    """What the trial's number says; gives the files that are no more what they were."""
    number, dice = trial.number, trial.random
    file = dice.choice(list(files))
    data = bytearray(files[file])
    if number < 1000:
        trial.note(flipped_bits=1)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif number < 1200:
        trial.note(truncations=1)
        del data[dice.randrange(len(data)) :]
    elif number < 1400:
        trial.note(zeroed_pages=1)
        begin = PAGE * dice.randrange(-(-len(data) // PAGE))
        end = min(begin + PAGE, len(data))
        data[begin:end] = bytes(end - begin)
    elif number < 1416:
        trial.note(missing_files=1)
        file = list(files)[number - 1400]
        file.unlink()
        return [file]
    else:
        trial.note(swapped_files=1)
        pair = list(itertools.combinations(files, 2))[number - 1416]
        for one, other in (pair, pair[::-1]):
            one.write_bytes(files[other])
        return list(pair)
    file.write_bytes(data)
    return [file]


def check_found(touched: list[Path], root: Path) -> None:
    for folder in {file.parent for file in touched}:
        if folder.parent.name != "checkpoints":
            with pytest.raises(ArtifactError) as caught:
                load_artifact(folder)
            assert str(folder) in str(caught.value)
            assert "\n" not in str(caught.value)
            continue
        problem = verify_checkpoint(folder)
        assert problem is not None, touched
        assert str(folder) in problem
        assert "\n" not in problem
    if {file.parent.name for file in touched} == {"step-00000008"} and touched[0].exists():
        newest = manager(root).load_latest()
        assert newest is not None
        assert newest.step == 4


@pytest.mark.scenario("damage")
def test_damage_is_found(trial_log: TrialLog, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = list(dict.fromkeys(file.parent for file in files))
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            touched = spoil(trial, files)
            try:
                check_found(touched, tmp_path)
            finally:
                for file in touched:
                    file.write_bytes(files[file])
    trial_log.check()
    for folder in whole:  # and nothing is found where nothing is
        assert (verify_checkpoint(folder) if folder.name.startswith("step") else load_artifact(folder)[0].keys()) in (
            None,
            {"w"},
        )


def test_checkpoint_under_another_steps_name_is_refused(files: Files, tmp_path: Path) -> None:
    old, new = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (4, 8))
    new.rename(tmp_path / "aside")
    old.rename(new)
    assert "step 4, expected 8" in str(verify_checkpoint(new))
