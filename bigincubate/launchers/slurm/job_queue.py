"""What leases ask about Slurm's jobs."""

from __future__ import annotations

import os
from typing import Any

from ...errors import MissingDependencyError, SystemResourceError
from ...storage.lease import JobQueue
from .client import ENDED_STATES, query_job_state

SQUEUE_TIMEOUT = 3.0  # seconds in which Slurm must answer
# states of jobs without a running process: ended, or waiting to start (again)
NOT_RUNNING = ENDED_STATES - {"COMPLETING", "REVOKED"} | {
    *("PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}


class SlurmQueue(JobQueue):
    """Slurm, as leases need to know it."""

    def current_job(self) -> dict[str, Any]:
        """Return the job or array task of this process, its cluster, and how often it was restarted."""
        env = os.environ
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        return {
            "cluster": env.get("SLURM_CLUSTER_NAME"),
            "job": f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID"),
            "restarts": int(env.get("SLURM_RESTART_COUNT") or 0),
        }

    def has_ended(self, job: str) -> bool:
        """Return whether Slurm says that no process of a job runs; False if Slurm does not answer."""
        try:
            states = set(query_job_state(job, timeout=SQUEUE_TIMEOUT).split())
        except MissingDependencyError:
            return False
        except SystemResourceError as error:
            return "Invalid job id" in str(error)  # it ended so long ago that Slurm has forgotten it
        return bool(states) and states <= NOT_RUNNING
