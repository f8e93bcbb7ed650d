"""Read the rank of this process and the index of its array task from Slurm's environment variables."""

from __future__ import annotations

import os

from ...distributed.process_group import read_count
from ...errors import ConfigError


def set_torchrun_variables() -> None:
    """Set ``torchrun``'s environment variables from Slurm's if ``srun`` started this process as one of several ranks.

    Variables that ``torchrun`` set are kept. ``MASTER_ADDR`` must be set; the shipped sbatch files set it.

    Raises:
        ConfigError: A variable is not a non-negative integer.
    """
    env = os.environ
    under_torchrun = "RANK" in env and "WORLD_SIZE" in env
    # SLURM_NTASKS may be that of the allocation: an interactive shell in it is a step of one task
    ranks = read_count("SLURM_STEP_NUM_TASKS", 1)
    if under_torchrun or not {"SLURM_STEP_ID", "MASTER_ADDR"} <= env.keys() or ranks <= 1:
        return
    env["RANK"] = str(read_count("SLURM_PROCID", 0))
    env["WORLD_SIZE"] = str(ranks)
    env["LOCAL_RANK"] = str(read_count("SLURM_LOCALID", 0))
    env["LOCAL_WORLD_SIZE"] = str(read_count("SLURM_NTASKS_PER_NODE", 1))


def array_index() -> int:
    """Return the index of this Slurm array task, which is the number of its module.

    Raises:
        ConfigError: This process is not in an array task.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise ConfigError("--module auto needs SLURM_ARRAY_TASK_ID, which Slurm sets in an array task; give a number")
    return read_count("SLURM_ARRAY_TASK_ID", 0)
