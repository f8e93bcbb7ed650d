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
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def torchrun_variables() -> list[str | None]:
    set_torchrun_variables()
    return [os.environ.get(name) for name in TORCHRUN]


def test_rank_of_srun_is_set(step: pytest.MonkeyPatch) -> None:
    assert torchrun_variables() == ["5", "8", "1", "4"]


@pytest.mark.parametrize(
    ("tasks", "node", "local"),
    [("8", 0, "8"), ("4(x2)", 1, "4"), ("4(x2),3,1", 1, "4"), ("4(x2),3,1", 2, "3"), ("4,3(x2),1", 3, "1")],
)
def test_ranks_of_this_node_are_those_of_the_step(step: pytest.MonkeyPatch, tasks: str, node: int, local: str) -> None:
    """``--ntasks=8`` alone sets no SLURM_NTASKS_PER_NODE; if it is that of the allocation, the step's counts."""
    step.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    step.setenv("SLURM_NODEID", str(node))
    assert torchrun_variables()[3] == local
    step.delenv("SLURM_NTASKS_PER_NODE")
    step.delenv("RANK")
    step.delenv("LOCAL_WORLD_SIZE")
    assert torchrun_variables()[3] == local


@pytest.mark.parametrize(("tasks", "node", "local"), [("4", 1, "4"), ("4(x2)", 1, "4"), ("4,2", 1, "2")])
def test_option_counts_where_the_step_says_nothing(step: pytest.MonkeyPatch, tasks: str, node: int, local: str) -> None:
    step.setenv("SLURM_NTASKS_PER_NODE", tasks)
    step.setenv("SLURM_NODEID", str(node))
    assert torchrun_variables()[3] == local


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("4(x2", r"SLURM_STEP_TASKS_PER_NODE is '4\(x2', not of the form"),
        ("", "SLURM_STEP_TASKS_PER_NODE is '', not of the form"),
        ("4(x2)", r"SLURM_NODEID is 2, but SLURM_STEP_TASKS_PER_NODE is '4\(x2\)', which has 2 nodes"),
    ],
)
def test_counts_that_cannot_be_read_are_refused(step: pytest.MonkeyPatch, tasks: str, message: str) -> None:
    step.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    step.setenv("SLURM_NODEID", "2")
    with pytest.raises(ConfigError, match=message):
        set_torchrun_variables()


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
