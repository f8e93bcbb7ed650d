"""One `submit` on a cluster where a node crashes, an array task is requeued and ranks are killed: the same bits."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from cluster import ARRAY, Cluster, committed, kill, kinds, nodes, processes, ranks, running
from conftest import Command
from parity import launch
from trial_log import Trial, TrialLog

from bigincubate.config import Phase
from bigincubate.errors import ExternalError
from bigincubate.storage.run_directory import RunDir

SETS = [
    *("train.max_steps=80", "checkpoint.every_steps=5", "log.every_steps=1", "finetune.sharding.strategy=fsdp2"),
    *("slurm.finetune.nodes=2", "slurm.umask=027", "log.images=0"),
]
Phases = list[tuple[Phase, int | None]]
PHASES: Phases = [("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)]
Fault = Callable[["Struck"], bool]


@pytest.fixture(scope="module")
def calm(harness: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run to which nothing happens, with the same layout: fine-tuning on two ranks, the rest on one."""
    one = harness(*SETS)
    for phase, module in PHASES[:-1]:
        one.train(phase, module)
    outcomes = launch(tmp_path_factory.mktemp("ranks"), [{"words": [str(word) for word in one.command("finetune")]}])
    assert [outcome["code"] for outcome in outcomes[0]] == [0, 0]
    run: RunDir = one.run
    return run


class Struck:
    """A run on the cluster, and the faults that are still to come to it."""

    def __init__(self, cluster: Cluster, run: RunDir, trial: Trial, known: Phases = PHASES) -> None:
        self.cluster, self.run, self.trial = cluster, run, trial
        draw = trial.random
        phases = [f"{phase}/{module}" if phase == "incubate" else phase for phase, module in known]
        self.faults: list[tuple[str, Fault, str]] = [
            ("crashes", crash, draw.choice(phases)),
            ("requeues", requeue, draw.choice(phases[1:-1])),
            ("kills", kill_rank, draw.choice(phases)),
        ]
        if trial.number % 2:
            self.faults.append(("gates killed", kill_gate, "gate"))
        self.done = dict.fromkeys((name for name, *_ in self.faults), 0)

    def look(self) -> bool:
        """Strike where something is ripe. Gives whether the run has ended."""
        for fault in list(self.faults):
            name, strike, key = fault
            self.key = key
            try:
                if strike(self):
                    self.faults.remove(fault)
                    self.done[name] += 1
            except ExternalError:  # Slurm is busy
                continue
        return (self.run.path / "export" / "model.safetensors").exists()

    def ripe(self) -> bool:
        phase, _, module = self.key.partition("/")
        folder = self.run.phase(cast(Phase, phase), int(module) if module else None)
        return folder.result is None and committed(folder) > 0


def crash(struck: Struck) -> bool:
    entry = struck.ripe() and running(struck.run, struck.key)
    if not entry or not (names := nodes(entry)):
        return False
    node = struck.trial.random.choice(names)
    struck.cluster.control("crash", node)
    if struck.trial.random.random() < 0.5:  # Slurm learns of it before the node is back
        struck.cluster.wait(lambda: struck.cluster.down(node))
    struck.cluster.control("revive", node)
    return True


def requeue(struck: Struck) -> bool:
    entry = struck.ripe() and running(struck.run, struck.key)
    if not entry:
        return False
    assert entry.module is not None
    task = f"{entry.job}_{entry.module % ARRAY}"  # of an array that was split
    return subprocess.run(["scontrol", "requeue", task], check=False).returncode == 0


def kill_rank(struck: Struck) -> bool:
    phase, _, module = struck.key.partition("/")
    pids = struck.ripe() and ranks(struck.run, phase, int(module) if module else None)
    if not pids:
        return False
    kill(struck.trial.random.choice(pids))
    return True


def kill_gate(struck: Struck) -> bool:
    pids = processes(struck.run, "resume", "--gate")
    for pid in pids:
        kill(pid)
    return bool(pids)


@pytest.mark.scenario("slurm")
def test_one_submit_ends_in_the_model_whatever_happens(
    slurm: Cluster, calm: RunDir, fast: Path, tmp_path: Path, bigincubate: Command, trial_log: TrialLog
) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            began, run = time.monotonic(), RunDir(tmp_path / str(trial.number))
            sets = [word for item in SETS for word in ("--set", item)]
            submitted = bigincubate("submit", fast, "--run-dir", run.path, *sets)
            assert submitted.returncode == 0, submitted.stderr
            struck = Struck(slurm, run, trial)
            try:
                slurm.wait(struck.look)
                slurm.wait_empty()
            finally:
                bigincubate("cancel", run.path)
            check(run, calm)
            attempts = sum(len(run.phase(phase, module).read_attempts()) for phase, module in PHASES)
            hits = {name.replace(" ", "_"): count for name, count in struck.done.items()}
            assert sum(hits.values()) >= 2, f"the run was over before it was struck: {hits}"
            seconds = round(time.monotonic() - began)
            trial.note(faults=sum(hits.values()), attempts=attempts, seconds=seconds, **hits)
    trial_log.check()


def check(run: RunDir, calm: RunDir) -> None:
    same(run, calm, PHASES)
    for phase, module in PHASES:
        assert (run.phase(phase, module).path / "DONE").stat().st_mode & 0o777 == 0o640, (phase, module)
    assert kinds(run) == ["pretrain", "incubate", "gate", "finetune", "gate"]


def same(run: RunDir, calm: RunDir, phases: Phases) -> None:
    for phase, module in phases:
        folders = [one.phase(phase, module) for one in (run, calm)]
        digests = [json.loads((folder.artifact / "manifest.json").read_text())["digest"] for folder in folders]
        assert digests[0] == digests[1], (phase, module)
        scores = [{**(folder.result or {}), "seconds": 0} for folder in folders]
        assert scores[0] == scores[1], (phase, module)


@pytest.mark.slurm
def test_digits_in_full(slurm: Cluster, tmp_path: Path, bigincubate: Command) -> None:
    """The README's recipe as it is, with `submit` alone and with `run`: a crashed node, a requeued task and a killed
    rank make no difference."""
    phases: Phases = [("pretrain", None), *(("incubate", module) for module in range(4)), ("finetune", None)]
    calm, run = RunDir(tmp_path / "calm"), RunDir(tmp_path / "struck")
    assert bigincubate("submit", "digits", "--run-dir", run.path).returncode == 0
    struck = Struck(slurm, run, Trial("digits", 0, 0), phases)
    try:
        slurm.wait(struck.look, 3600)
        slurm.wait_empty()
    finally:
        bigincubate("cancel", run.path)
    assert struck.done == {"crashes": 1, "requeues": 1, "kills": 1}
    assert bigincubate("run", "digits", "--run-dir", calm.path, "--jobs", 2, timeout=3600).returncode == 0
    same(run, calm, phases)
    summary = bigincubate("verify", run.path)
    assert summary.returncode == 0, summary.stdout
    print(json.dumps({phase: run.phase(phase).result for phase in ("pretrain", "finetune")}))
