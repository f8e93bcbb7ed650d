"""How a Slurm job decides whether it is requeued when it ends. Needs no Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import make_result

from bigincubate.launchers.slurm import requeue as ending
from bigincubate.launchers.slurm.requeue import handle_job_exit
from bigincubate.storage.run_directory import PhaseDir


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Slurm that says of every job that it runs, and notes what it was asked to requeue."""
    asked: list[str] = []
    monkeypatch.setattr(ending, "query_job_state", lambda job: "RUNNING")
    monkeypatch.setattr(ending, "requeue_job", asked.append)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return asked


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_job_that_would_fail_again_is_not_requeued(tmp_path: Path, code: int, requeued: list[str]) -> None:
    assert handle_job_exit(PhaseDir(tmp_path), "1", code)[0] == code
    assert requeued == []


def test_finished_phase_is_done_whatever_srun_returns(tmp_path: Path, requeued: list[str]) -> None:
    PhaseDir(tmp_path).write_result(make_result())
    assert handle_job_exit(PhaseDir(tmp_path), "1", 137)[0] == 0
    assert requeued == []


def test_job_ended_by_slurm_is_not_requeued(
    tmp_path: Path, requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "query_job_state", lambda job: "COMPLETING")
    assert handle_job_exit(PhaseDir(tmp_path), "1", 75) == (
        75,
        "stopped with a checkpoint; Slurm has ended this job: COMPLETING",
    )
    assert requeued == []


def test_restarts_are_bounded(tmp_path: Path, requeued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGINCUBATE_MAX_REQUEUES", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    code, why = handle_job_exit(PhaseDir(tmp_path), "1", 137)
    assert (code, why) == (
        137,
        "a rank was ended by SIGKILL; not requeued: already requeued 2 times (slurm.max_requeues)",
    )
    assert requeued == []


def test_job_without_progress_is_requeued_three_times(tmp_path: Path, requeued: list[str]) -> None:
    folder = PhaseDir(tmp_path)
    for step in (5, 10, 10, 10):
        marker = folder.checkpoints / f"step-{step:08d}" / "COMMITTED"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        assert "; requeued" in handle_job_exit(folder, "4_1", 137)[1]
    assert "no progress in 3 requeues" in handle_job_exit(folder, "4_1", 137)[1]
    assert requeued == ["4_1"] * 4
    assert (
        "; requeued" in handle_job_exit(folder, "9_1", 137)[1]
    )  # a job that a person submitted afterwards counts anew
