"""What is submitted when Slurm refuses, loses and kills jobs, on a simulated Slurm whose faults are drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm

from bigincubate.config import Phase, load_recipe
from bigincubate.config.seeds import phase_key
from bigincubate.planning.context import open_run
from bigincubate.planning.job_graph import Job, build_job_graph
from bigincubate.planning.planned_row import Cost, PlannedRow
from bigincubate.storage.run_directory import RunDir


def make_graph(modules: Iterable[int]) -> list[Job]:
    """The jobs of a run that incubates these modules."""
    phases: list[tuple[Phase, int | None]] = [("pretrain", None), ("finetune", None)]
    phases[1:1] = [("incubate", module) for module in modules]
    numbers = {"batch_size": 1, "batch_units": 1, "steps": 1, "epochs": 1.0, "seen": 1, "total_flops": 1}
    about: dict[str, Any] = {"metrics": (), "unit": "images", "cost": Cost(*[1] * 7), **numbers}
    rows = [
        PlannedRow(key=phase_key(phase, module), phase=phase, module=module, title=f"{phase} {module}", **about)
        for phase, module in phases
    ]
    return build_job_graph(rows, baseline=False)


def run_to_the_end(seed: int, modules: int, fast: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    draw = random.Random(f"limits {seed}")
    submit_limit, size = draw.choice([modules // 8, modules // 2, 10**9]), draw.choice([modules // 4, 10**6, 0])
    slurm = FakeSlurm(RunDir(folder), seed, range(modules if size else modules // 5), submit_limit, size)
    slurm.install(monkeypatch)
    calls = slurm.complete(load_recipe(str(fast)), make_graph(slurm.modules))
    print(f"{len(slurm.modules)} modules, {len(slurm.jobs)} jobs, {calls} calls of a user, {dict(slurm.faults)}")
    return slurm


@pytest.mark.parametrize("seed", range(8))
def test_modules_are_trained_once_whatever_happens(
    seed: int, fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With refusals, crashes, requeues, held tasks, lost gates and answers, slow Epilogs, and limits."""
    assert sum(run_to_the_end(seed, 100, fast, tmp_path, monkeypatch).faults.values()) > 0


@pytest.mark.parametrize("modules", [[], [1, 3]])
def test_fine_tuning_follows_the_meta_model_and_the_modules_that_are_incubated(
    modules: list[int], fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(RunDir(tmp_path), 0, modules, fault=0)
    slurm.install(monkeypatch)
    assert slurm.complete(load_recipe(str(fast)), make_graph(modules)) == 1
    assert slurm.finished == {"pretrain", *(f"incubate/{module}" for module in modules), "finetune"}


def test_submitted_expansion_is_done_without_its_user_though_fine_tuning_crashes(
    fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    run = RunDir(tmp_path / "run")
    slurm = FakeSlurm(run, 0, [], fault=0, outcomes={"finetune": ["crash"]})
    slurm.install(monkeypatch)
    code, out, err = call("submit", fast, "--run-dir", run.path, "--method", "expand")
    assert code == 0, out + err
    opened = open_run(run.load_recipe(), run)
    assert slurm.complete(opened.recipe, build_job_graph(opened.rows, baseline=False)) == 0
    assert slurm.finished == {"pretrain", "finetune"}
    kinds = [job.kind for job in slurm.jobs.values()]
    assert "incubate" not in kinds
    fine_tuning = [job for job in slurm.jobs.values() if job.kind == "finetune"]
    assert [job.tasks[None].outcome for job in fine_tuning] == ["crash", "well"]
    # both were submitted by a gate, which had waited for the meta model and for the job that crashed
    assert kinds[:2] == ["pretrain", "gate"]
    assert kinds.count("gate") >= 3


@pytest.mark.full
def test_thousand_modules_are_trained_once_with_each_of_100_seeds(
    fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: Counter[str] = Counter()
    for seed in range(100):
        faults += run_to_the_end(seed, 1000, fast, tmp_path / str(seed), monkeypatch).faults
    print(dict(faults))
    assert min(faults.values()) >= 20
