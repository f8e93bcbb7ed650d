"""Answer the queries of leases about Slurm jobs."""

from __future__ import annotations

import os
from typing import Any

from ...errors import MissingDependencyError, SystemResourceError
from ...storage.lease import JobQueue
from .client import ENDED_STATES, query_job_state

SQUEUE_TIMEOUT = 3.0  # seconds
# states of jobs without a running process: ended, or waiting for a start or restart
NOT_RUNNING = ENDED_STATES - {"COMPLETING", "REVOKED"} | {
    *("PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}


class SlurmQueue(JobQueue):
    """Slurm's implementation of the queries of leases."""

    def current_job(self) -> dict[str, Any]:
        """Return the job or array task of this process, its cluster, and the number of its restarts."""
        env = os.environ
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        return {
            "cluster": env.get("SLURM_CLUSTER_NAME"),
            "job": f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID"),
            "restarts": int(env.get("SLURM_RESTART_COUNT") or 0),
        }

    def has_ended(self, job: str) -> bool:
        """Return whether Slurm reports that no process of a job is running; False if Slurm does not answer."""
        try:
            states = set(query_job_state(job, timeout=SQUEUE_TIMEOUT).split())
        except MissingDependencyError:
            return False
        except SystemResourceError as error:
            return "Invalid job id" in str(error)  # it ended so long ago that Slurm no longer knows it
        return bool(states) and states <= NOT_RUNNING
