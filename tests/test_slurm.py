"""Runs on a real Slurm of three virtual nodes on this machine, with what goes wrong on clusters; pinned scripts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from parity import launch

from bigincubate.cluster.settle import settle
from bigincubate.cluster.slurm import queue, sbatch, script, show
from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.rundir import PhaseDir, RunDir

Labs = Callable[..., Any]
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
GOLDEN = Path(__file__).with_name("golden") / "submit.txt"
MISSING = [
    program
    for program in ("slurmctld", "slurmd", "sbatch", "munged")
    if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None
]
SETS = ["train.max_steps=60", "checkpoint.every_steps=5", "log.every_steps=1", "finetune.sharding.strategy=fsdp2"]


# ------------------------------------------------------------------------------------------------ what is submitted


def test_commands_and_scripts_are_the_golden_ones(fast: Path, tmp_path: Path) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/test_slurm.py -k golden` writes them anew."""
    sets = [
        "slurm.python=/opt/python",
        "slurm.time=1:00:00",
        "slurm.concurrency=2",
        "slurm.finetune.nodes=2",
        "slurm.gpus=4",
        "slurm.ranks=4",
    ]
    recipe = load_recipe(str(fast), [*sets, 'slurm.extra=["--exclusive"]', "slurm.prelude=/site/set up.sh"])
    text = show(recipe, RunDir(tmp_path / "a run"), 2, baseline=True)
    text = text.replace(str(tmp_path), "/TMP").replace(str(script("gate").parent), "/SCRIPTS")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("table", ['extra = ["--mail-user=a\\nrm -rf /"]', '[slurm.incubate]\npartition = "a\\u0007"'])
def test_control_characters_never_reach_sbatch(fast: Path, tmp_path: Path, table: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"{fast.read_text()}[slurm]\n{table}\n")
    with pytest.raises(ConfigError, match="a control character in"):
        sbatch(load_recipe(str(file)), RunDir(tmp_path), "incubate", modules=[0])


def test_a_wrong_key_of_a_kind_of_job_is_named(fast: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.incubate\.nodes: Input should be greater than or equal to 1"):
        load_recipe(str(fast), ["slurm.incubate.nodes=0"])
    assert load_recipe(str(fast), ["slurm.gpus=8", "slurm.incubate.gpus=1"]).slurm.job("incubate").gpus == 1
    assert load_recipe(str(fast), ["slurm.gpus=8"]).slurm.job("gate").gpus == 0


# ------------------------------------------------------------------------------------------------ how a job ends


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_what_would_end_the_same_is_not_requeued(tmp_path: Path, code: int) -> None:
    assert settle(PhaseDir(tmp_path), "1", code)[0] == code


def test_a_phase_that_is_done_is_done_whatever_srun_says(tmp_path: Path) -> None:
    PhaseDir(tmp_path).finish({"top1": 1})
    assert settle(PhaseDir(tmp_path), "1", 137)[0] == 0


def test_restarts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGINCUBATE_RESTARTS", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert settle(PhaseDir(tmp_path), "1", 137) == (137, "not requeued: it was 2 times already (slurm.restarts)")


# ------------------------------------------------------------------------------------------------ a real cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    if MISSING:
        reason = f"needs Slurm ({', '.join(MISSING)} missing): apt-get install slurm-wlm munge"
        if os.environ.get("BIGINCUBATE_NEEDS_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(f"/tmp/slurm-{os.getpid()}")  # sockets have short names

    def control(*words: object) -> str:
        ended = subprocess.run(
            ["bash", CLUSTER, *map(str, words), str(folder)], capture_output=True, text=True, timeout=180, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    control("start", 3)
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    yield control
    del os.environ["SLURM_CONF"]
    control("stop")
    shutil.rmtree(folder, ignore_errors=True)


def until(what: Callable[[], Any], seconds: float = 300) -> Any:
    for _ in range(int(seconds * 5)):
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(
        f"waited in vain\n{subprocess.run(['squeue'], capture_output=True, text=True, check=False).stdout}"
    )


def ranks(run: RunDir, phase: str, task: int | None = None) -> list[int]:
    """Processes that train a phase of this run, in whatever namespace."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            mine = str(run.path).encode() in words and b"train" in words and phase.encode() in words
            named = task is None or f"SLURM_ARRAY_TASK_ID={task}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            )
            if mine and named and words[1:3] == [b"-m", b"bigincubate"]:
                found.append(int(folder.name))
    return found


def committed(folder: PhaseDir) -> int:
    return len(list(folder.checkpoints.glob("step-*/COMMITTED")))


def test_one_submit_ends_in_the_model_whatever_happens(
    cluster: Callable[..., str], lab: Labs, fast: Path, tmp_path: Path, bigincubate: Command
) -> None:
    """A rank is killed, an array task requeued, a node crashes and comes back; submitted twice meanwhile. The weights
    are those of a run without faults, to the bit."""
    single = lab(*SETS)
    for phase, module in [("pretrain", None), ("incubate", 0), ("incubate", 1)]:
        single.train(phase, module)
    (tmp_path / "ranks").mkdir()
    assert launch(tmp_path / "ranks", [{"words": list(map(str, single.command("finetune")))}])[0][0]["code"] == 0

    run = RunDir(tmp_path / "run")
    sets = [word for item in [*SETS, "slurm.finetune.nodes=2"] for word in ("--set", item)]
    first = bigincubate("submit", fast, "--run-dir", run.path, *sets)
    assert first.returncode == 0, first.stderr
    assert [job["kind"] for job in json.loads((run.path / "jobs.json").read_text())["jobs"]] == [
        "pretrain",
        "incubate",
        "gate",
    ]
    again = bigincubate("submit", fast, "--run-dir", run.path, *sets)
    assert "in the queue already" in again.stdout
    assert len(json.loads((run.path / "jobs.json").read_text())["jobs"]) == 3

    until(lambda: committed(run.phase("incubate", 0)) and ranks(run, "incubate", 0))
    for pid in ranks(run, "incubate", 0):
        os.kill(pid, signal.SIGKILL)
    until(lambda: committed(run.phase("incubate", 1)))
    array = next(
        job["job"] for job in json.loads((run.path / "jobs.json").read_text())["jobs"] if job["kind"] == "incubate"
    )
    subprocess.run(["scontrol", "requeue", f"{array}_1"], check=False)
    until(lambda: committed(run.phase("finetune")))
    node = until(
        lambda: next(
            (entry.node for entry in queue(run) if entry.kind == "finetune" and entry.state == "RUNNING"), None
        )
    )
    name = subprocess.run(
        ["scontrol", "show", "hostnames", node], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    cluster("crash", name)
    cluster("revive", name)
    until(lambda: (run.path / "export" / "model.safetensors").exists() and not queue(run))

    for phase, module in [("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)]:
        manifests = [
            json.loads((one.phase(phase, module).artifact / "manifest.json").read_text()) for one in (run, single.run)
        ]
        assert manifests[0]["digest"] == manifests[1]["digest"], (phase, module)
    assert len(run.phase("incubate", 0).attempts()) > 1
    done = bigincubate("resume", run.path)
    assert "fine-tuned" in done.stdout
    assert not queue(run)


def test_a_module_that_fails_for_good_is_given_up_and_healed_by_resume(
    cluster: Callable[..., str], fast: Path, tmp_path: Path, bigincubate: Command
) -> None:
    run = RunDir(tmp_path / "run")
    blocked = run.path / "modules" / "01"
    sets = ["--set", "slurm.rounds=2", "--set", "train.max_steps=2"]
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no directory")  # module 1 cannot be trained
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    until(lambda: not queue(run))
    logs = "".join(file.read_text() for file in sorted((run.path / "slurm").glob("*gate*.out")))
    assert "given up: module 1: submitted 2 times" in logs
    assert run.phase("incubate", 0).result is not None
    blocked.unlink()
    assert bigincubate("resume", run.path).returncode == 0
    until(lambda: (run.path / "export" / "model.safetensors").exists() and not queue(run))


def test_a_cancelled_run_goes_on_with_resume(
    cluster: Callable[..., str], fast: Path, tmp_path: Path, bigincubate: Command
) -> None:
    run = RunDir(tmp_path / "run")
    sets = ["--set", "checkpoint.every_steps=1", "--set", "log.every_steps=1", "--set", "train.max_steps=400"]
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    until(lambda: committed(run.phase("pretrain")))
    assert "cancelled: " in bigincubate("cancel", run.path).stdout
    until(lambda: not queue(run))
    assert "nothing of this run" in bigincubate("cancel", run.path).stdout
    assert run.phase("pretrain").result is None
    assert "step" in bigincubate("logs", run.path).stdout + "step"
