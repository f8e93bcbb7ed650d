"""Slurm's variables of a job step become those of torchrun."""

from __future__ import annotations

import os

import pytest

from bigincubate.errors import ConfigError
from bigincubate.launchers.slurm.environment import set_torchrun_variables

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "MASTER_ADDR": "node-0",
}


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 5 of 8 in a job step of two nodes."""
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def torchrun_variables() -> list[str | None]:
    set_torchrun_variables()
    return [os.environ.get(name) for name in TORCHRUN]


def test_rank_of_srun_is_set(step: pytest.MonkeyPatch) -> None:
    assert torchrun_variables() == ["5", "8", "1", "4"]


def test_rank_of_torchrun_is_kept(step: pytest.MonkeyPatch) -> None:
    step.setenv("RANK", "1")
    step.setenv("WORLD_SIZE", "2")
    assert torchrun_variables() == ["1", "2", None, None]


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_STEP_ID", None), ("MASTER_ADDR", None), ("SLURM_STEP_NUM_TASKS", "1")]
)
def test_process_outside_a_step_of_several_ranks_sets_nothing(
    name: str, value: str | None, step: pytest.MonkeyPatch
) -> None:
    step.delenv(name)
    if value is not None:
        step.setenv(name, value)
    assert torchrun_variables() == [None] * 4


def test_interactive_shell_in_an_allocation_is_no_rank(step: pytest.MonkeyPatch) -> None:
    step.setenv("SLURM_NTASKS", "8")
    step.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert torchrun_variables() == [None] * 4


def test_invalid_rank_names_its_variable(step: pytest.MonkeyPatch) -> None:
    step.setenv("SLURM_PROCID", "x")
    with pytest.raises(ConfigError, match="SLURM_PROCID is 'x'"):
        set_torchrun_variables()
