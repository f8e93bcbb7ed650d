"""Client of Slurm's command-line programs: submit, list, requeue and cancel jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from ...errors import MissingDependencyError, SystemResourceError

DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's default for MaxArraySize
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"),
}
# Variables of the calling shell or job would change what Slurm's programs do: SQUEUE_PARTITION hides jobs, and
# SBATCH_ARRAY_INX makes an array of every job. These only tell the programs how to reach Slurm, or what jobs inherit.
SLURM_VARIABLE = re.compile("(SLURM|SLURMD|SBATCH|SQUEUE|SRUN|SALLOC|SCANCEL|SACCT|SINFO|SCONTROL)_")
KEPT_VARIABLES = {
    *("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET", "SLURM_SACK_KEY", "SBATCH_EXPORT"),
}
# what sbatch prints when it does not know whether Slurm has accepted the job
NO_ANSWER = re.compile(
    "timed? ?out|unable to contact|zero bytes|connect|communication|exit code -|message (send|receive)|transport"
    "|broken pipe|unexpected message|header length|insane message",
    re.IGNORECASE,
)
# what sbatch prints when too many jobs are in the queue
LIMIT = re.compile(
    "MaxSubmit|GrpSubmit|MaxJob|job count|too many jobs|temporarily unavailable|array size", re.IGNORECASE
)
SUBMIT_TIMEOUT = 300  # seconds; sbatch itself tries for two minutes to find room in a full queue


class JobRefusedError(SystemResourceError):
    """``sbatch`` refused a job."""

    @property
    def at_limit(self) -> bool:
        """Return whether the reason may be a limit on the number of jobs."""
        return LIMIT.search(str(self)) is not None


def run_slurm_command(*words: str, cluster: str | None = None, timeout: float = 120, both: bool = False) -> str:
    """Run one of Slurm's programs and return its standard output.

    Args:
        words: The program and its arguments.
        cluster: The cluster to ask; None for the one of this machine.
        timeout: Time limit in seconds.
        both: Whether to return standard error too.

    Raises:
        MissingDependencyError: If the program is not installed.
        SystemResourceError: If the program fails or exceeds the time limit.
    """
    program, *arguments = words
    if shutil.which(program) is None:
        raise MissingDependencyError(f"{program} not found: this command needs Slurm; use `bigincubate run` instead")
    command = [program, *([f"--clusters={cluster}"] if cluster else []), *arguments]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            text=True,
            errors="replace",
            env=slurm_environment(),
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SystemResourceError(f"{program} did not finish within {timeout:.0f} s; try again later") from None
    if ended.returncode:
        printed = join_lines(program, (ended.stderr or "").strip() or ended.stdout.strip())
        raise SystemResourceError(f"{program} failed: {printed or f'exit code {ended.returncode}'}")
    return ended.stdout.strip()


def join_lines(program: str, text: str) -> str:
    """Return what a program of Slurm has printed as one line, each message once and without the program's name."""
    lines = [re.sub(f"^{program}: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))


def slurm_environment() -> dict[str, str]:
    """Return the environment of Slurm's programs: that of this process, without variables that change what they do."""
    return {key: value for key, value in os.environ.items() if key in KEPT_VARIABLES or not SLURM_VARIABLE.match(key)}


def submit_job(command: Sequence[str]) -> tuple[str | None, str | None]:
    """Run ``sbatch`` and return the id of the job and its cluster, each None if ``sbatch`` does not print it.

    Raises:
        JobRefusedError: If Slurm refuses the job.
        SystemResourceError: If it is unknown whether Slurm has accepted the job.
    """
    try:
        return parse_job_id(run_slurm_command(*command, timeout=SUBMIT_TIMEOUT))
    except MissingDependencyError:
        raise
    except SystemResourceError as error:
        text = str(error).removeprefix("sbatch failed: ")
        if text == str(error) or NO_ANSWER.search(text):
            raise
        raise JobRefusedError(text) from None


def test_submission(command: Sequence[str]) -> str:
    """Return what ``sbatch --test-only`` prints about a job: when and where it would start.

    Args:
        command: The command; its dependencies on other jobs are left out.

    Raises:
        SystemResourceError: Slurm would refuse the job.
    """
    words = [word for word in command if not word.startswith(("--dependency=", "--kill-on-invalid-dep="))]
    return join_lines("sbatch", run_slurm_command(words[0], "--test-only", *words[1:], both=True))


def parse_job_id(answer: str) -> tuple[str | None, str | None]:
    """Return the job id in the answer of ``sbatch``, and the cluster if the job is on another one.

    Sites replace ``sbatch`` by scripts that print more lines, or that ignore ``--parsable``.

    Args:
        answer: ``12``, ``12;cluster`` or ``Submitted batch job 12 on cluster west``, possibly among other lines.
    """
    for pattern in (
        r"submitted batch job (\d+)(?: on cluster ([\w.-]+))?",
        r"^\s*(\d+)(?:;([\w.-]+))?\s*$",
        r"\bjob(?:[ _-]?id)?\W{1,3}(\d+)\b()",
    ):
        if found := re.findall(pattern, answer, re.MULTILINE | re.IGNORECASE):
            job, cluster = found[-1]
            return job, cluster or None
    return None, None


def query_job_state(job: str, timeout: float = 120) -> str:
    """Return the state of a job or an array task in Slurm, such as ``RUNNING`` or ``COMPLETING``.

    Args:
        job: Id of the job, or of an array task (``12_3``).
        timeout: Time limit in seconds.

    Raises:
        SystemResourceError: If Slurm does not answer or no longer knows the job.
    """
    answer = run_slurm_command("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job, timeout=timeout)
    return "\n".join(re.findall(r"^\s*([A-Z_]+)\s*$", answer, re.MULTILINE))  # without other lines of a site's script


def requeue_job(job: str) -> None:
    """Requeue a job or an array task.

    Raises:
        SystemResourceError: If Slurm refuses.
    """
    run_slurm_command("scontrol", "requeue", job)


def hides_jobs_of_others() -> bool:
    """Return whether Slurm shows a user only their own jobs (``PrivateData=jobs``).

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    config = run_slurm_command("scontrol", "show", "config")
    return re.search(r"^PrivateData\s*=.*\b(jobs|all)\b", config, re.MULTILINE) is not None


def query_max_array_size(cluster: str | None = None) -> int:
    """Return Slurm's MaxArraySize. The indices of an array are smaller; 0 if there are no arrays.

    Raises:
        SystemResourceError: If Slurm does not answer.
    """
    config = run_slurm_command("scontrol", "show", "config", cluster=cluster)
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE
