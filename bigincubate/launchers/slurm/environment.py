"""Read the rank of this process and the index of its array task from Slurm's environment variables."""

from __future__ import annotations

import os
import re

from ...distributed.process_group import read_count
from ...errors import ConfigError, format_count


def set_torchrun_variables() -> None:
    """Set ``torchrun``'s environment variables from Slurm's if ``srun`` started this process as one of several ranks.

    Variables that ``torchrun`` set are kept. ``MASTER_ADDR`` must be set; the shipped sbatch files set it.

    Raises:
        ConfigError: A variable has an invalid value.
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
    env["LOCAL_WORLD_SIZE"] = str(_count_local_tasks())


def _count_local_tasks() -> int:
    """Return the number of tasks of this job step on this node.

    Nodes may have different numbers: only the limits of one machine (GPUs, shared memory) depend on it.

    Raises:
        ConfigError: Slurm's variables contradict each other or cannot be read.
    """
    # SLURM_NTASKS_PER_NODE exists only if the option of this name was given
    name = next((each for each in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE") if each in os.environ), None)
    if name is None:
        return 1
    text, node = os.environ[name], read_count("SLURM_NODEID", 0)
    counts: list[int] = []
    for group in text.split(","):
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)) is None:
            raise ConfigError(f"the environment variable {name} is {text!r}, not of the form 4(x2),3; correct it")
        counts += [int(found[1])] * int(found[2] or 1)
    if name == "SLURM_NTASKS_PER_NODE" and len(counts) == 1:
        return counts[0]  # the option, which holds for every node
    if node >= len(counts):
        nodes = format_count(len(counts), "node")
        raise ConfigError(f"SLURM_NODEID is {node}, but {name} is {text!r}, which has {nodes}; correct it")
    return counts[node]


def array_index() -> int:
    """Return the index of this Slurm array task, which is the number of its module.

    Raises:
        ConfigError: This process is not in an array task.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise ConfigError("--module auto needs SLURM_ARRAY_TASK_ID, which Slurm sets in an array task; give a number")
    return read_count("SLURM_ARRAY_TASK_ID", 0)
