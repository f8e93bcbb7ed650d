"""`bigincubate verify`: everything in a run directory is looked at, and each verdict is told with its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run

from bigincubate.data.dataset import open_dataset
from bigincubate.data.verification import find_damaged_shards
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_artifact, save_artifact
from bigincubate.storage.lease import acquire_lease

Harnesses = Callable[..., Any]
GOOD, DAMAGED, STALE, RUNNING, UNFINISHED, ABSENT = Verdict


@pytest.fixture(scope="module")
def trained(harness: Harnesses) -> Any:
    """A run whose module 1 is missing, with data of its own that can be spoiled."""
    made = harness("train.max_steps=4", "checkpoint.every_steps=2", "log.every_steps=2")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    return made


@pytest.fixture
def mine(trained: Any, tmp_path: Path) -> Any:
    return trained.copy(tmp_path / "run")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def verdicts(harness: Any) -> dict[tuple[str, str], Verdict]:
    return {(each.part, each.path.name): each.verdict for each in verify_run(harness.run)}


def test_finished_run_is_valid(mine: Any) -> None:
    verified = run("verify", mine.run.path)
    assert (verified.wait(), verified.err) == (0, "")
    found = verdicts(mine)
    assert set(found.values()) == {GOOD}
    phases = ("pretrain", "incubate/0", "incubate/1", "finetune")
    wanted = {(phase, name) for phase in phases for name in ("DONE", "artifact", "step-00000002", "step-00000004")}
    assert found.keys() == wanted | {("data", mine.data.path.name), ("assembled", "artifact")}
    assert len(verified.out.splitlines()) == len(found)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("incubate/0", "modules/00/artifact/weights.safetensors"),
        ("incubate/0", "modules/00/artifact/manifest.json"),
        ("finetune", "finetune/DONE"),
        ("assembled", "assembled/artifact/weights.safetensors"),
        ("pretrain", "meta/checkpoints/step-00000002/rank-00000.safetensors"),
    ],
)
def test_damaged_file_is_named(part: str, file: str, mine: Any) -> None:
    spoiled = mine.run.path / file
    if spoiled.name == "DONE":
        spoiled.write_text("{")
    else:
        flip_a_bit(spoiled)
    verified = run("verify", mine.run.path, "--json")
    assert verified.wait() == 6
    bad = [row for row in json.loads(verified.out) if row["verdict"] != "good"]
    assert [(row["part"], row["verdict"]) for row in bad] == [(part, "damaged")]
    assert spoiled.parent.name in bad[0]["path"]
    assert "1 of" in verified.err


def test_damaged_shard_of_the_data_is_named(mine: Any, tmp_path: Path) -> None:
    shutil.copytree(mine.data.path, tmp_path / "data")
    recipe = mine.run.recipe_file
    recipe.write_text(recipe.read_text().replace(str(mine.data.path), str(tmp_path / "data")))
    assert set(verdicts(mine).values()) == {GOOD}
    shard = next((tmp_path / "data" / "val").glob("**/*.mds"))
    flip_a_bit(shard)
    bad = [each for each in verify_run(mine.run) if each.verdict is not GOOD]
    assert [(each.part, each.path, each.verdict) for each in bad] == [("data", shard, DAMAGED)]
    assert "SHA-256" in bad[0].why


@pytest.mark.parametrize("command", [["run"], ["train", "--phase", "pretrain"]], ids=["run", "train"])
def test_verify_data_finds_damage_that_leaves_no_trace(
    command: list[str], fast: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    assert list(find_damaged_shards(open_dataset(data))) == []  # and all are remembered
    shard = next(data.glob("train/**/*.mds"))
    status = shard.stat()
    flip_a_bit(shard)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    words = [command[0], fast, "--run-dir", tmp_path / "run", *command[1:], "--set", f"data.path={data}"]
    code, _, err = call(*words, "--verify-data")
    assert code == 3
    assert f"{shard} is damaged: SHA-256" in err
    assert not list((tmp_path / "run").rglob("attempts"))  # before anything was trained


def test_module_of_another_meta_model_is_stale(mine: Any, trained: Any) -> None:
    shutil.rmtree(mine.run.path / "meta")
    tensors, manifest = load_artifact(trained.run.path / "meta" / "artifact")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_artifact(mine.run.path / "meta" / "artifact", other, manifest)
    verified = run("verify", mine.run.path)
    assert verified.wait() == 4
    lines = [line for line in verified.out.splitlines() if line.startswith("stale")]
    assert [line.split()[1] for line in lines] == ["incubate/0", "incubate/1", "finetune", "assembled"]
    assert all("another meta model" in line for line in lines)


def test_unfinished_phase_is_told_from_a_damaged_one(mine: Any) -> None:
    for part in ("modules/00", "modules/01", "finetune"):
        (mine.run.path / part / "DONE").unlink()
    shutil.rmtree(mine.run.path / "finetune")
    for part in ("00", "01"):
        (mine.run.path / "modules" / part / "checkpoints" / ".saving-00000006-abc").mkdir()
    with acquire_lease(mine.run.path / "modules" / "01", DistributedContext()):
        found = verdicts(mine)
    assert (found["incubate/0", "00"], found["incubate/0", ".saving-00000006-abc"]) == (UNFINISHED, UNFINISHED)
    assert (found["incubate/1", "01"], found["incubate/1", ".saving-00000006-abc"]) == (RUNNING, RUNNING)
    assert found["finetune", "finetune"] is ABSENT
    assert found["incubate/1", "step-00000004"] is GOOD


def test_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    verified = run("verify", tmp_path)
    assert verified.wait() == 4
    assert verified.err == f"bigincubate: {tmp_path} is not a run directory (no recipe.toml in it)\n"
