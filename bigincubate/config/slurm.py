"""The table ``[slurm]``: settings of ``submit``, and the resources of each kind of job."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from .schema import OverridesOf, PathMark, PathText
from .tables import ConfigTable, Count, execution_field


def _check_option(text: str) -> str:
    """Check an option: the second word of a short one would be taken for the script."""
    if not text.startswith("--"):
        raise ValueError("each option is one word that starts with --, such as --gres=gpu:4")
    return text


Option = Annotated[str, AfterValidator(_check_option)]


class SlurmJobConfig(ConfigTable):
    """The resources that a job requests from Slurm. For keys that are None, the defaults of the cluster apply."""

    nodes: Count = execution_field(1)
    """Number of nodes of a job. Unit: nodes."""
    ranks: Count = execution_field(1)
    """Number of ranks per node, one per GPU. Unit: ranks."""
    gpus: int = execution_field(0, ge=0)
    """Number of GPUs per node. Unit: GPUs."""
    cpus: Count | None = execution_field(None)
    """Number of CPU cores per rank. Unit: cores."""
    memory: str | None = execution_field(None)
    """Memory per node with a unit, such as `"64G"`."""
    time: str | None = execution_field(None)
    """Time limit, such as `"2-00:00:00"` (two days); a job that is not done by then is requeued."""
    partition: str | None = execution_field(None)
    """Partition that the jobs run in."""
    account: str | None = execution_field(None)
    """Account that the jobs are charged to."""
    qos: str | None = execution_field(None)
    """Quality of service."""
    constraint: str | None = execution_field(None)
    """Features that nodes must have."""
    extra: list[Option] = execution_field([])
    """More options of sbatch, such as `["--exclusive"]`. The table of a kind of job adds its own to the common ones."""


JOB_KINDS = ("pretrain", "incubate", "finetune", "end_to_end", "gate")
GATE_DEFAULTS: dict[str, Any] = {"nodes": 1, "ranks": 1, "gpus": 0, "cpus": 1, "memory": "4G", "time": "0:30:00"}
# options of sbatch that the gate does not take over from `slurm.extra`: it needs no GPU and no whole node
RESOURCE_OPTIONS = (
    *("--exclusive", "--gpus", "--gres", "--mem", "--cores", "--cpus", "--nodes", "--nodelist", "--ntasks", "--tres"),
    *("--sockets", "--threads", "--extra-node-info", "--switches"),
)
JobTable = Annotated[dict[str, Any], OverridesOf(SlurmJobConfig)]


class SlurmConfig(SlurmJobConfig):
    """Settings of ``submit``. Tables such as ``[slurm.incubate]`` override the common keys for one kind of job."""

    pretrain: JobTable = execution_field({})
    """Resources of the job of the meta model that differ from the common keys."""
    incubate: JobTable = execution_field({})
    """Resources of each array task (one module) that differ from the common keys."""
    finetune: JobTable = execution_field({})
    """Resources of the fine-tuning job that differ from the common keys."""
    end_to_end: JobTable = execution_field({})
    """Resources of the job of the end-to-end baseline that differ from the common keys."""
    gate: JobTable = execution_field({})
    """Resources of the gate that differ from its defaults: one CPU core, `"4G"` of memory, half an hour, no GPU."""
    array_parallelism: Count | None = execution_field(None)
    """Maximum number of array tasks that run in parallel. None: no limit. Unit: tasks."""
    setup_script: PathText | None = execution_field(None)
    """Script that jobs source first, for environment modules, conda or proxies."""
    python: Annotated[str, PathMark(unless="[^/~$]+")] | None = execution_field(None)
    """Python interpreter of the jobs: a path, or a command such as `"python3"`. None: the one that runs `submit`."""
    host_python: Annotated[str, PathMark(unless="[^/~$]+")] | None = execution_field(None)
    """Interpreter of the job scripts and the gate, outside the container; it needs no torch. None: `python`, or with a
    container the one that runs `submit`."""
    container: str | None = execution_field(None)
    """Prefix of the python command of the ranks, such as `"apptainer exec --nv image.sif"`."""
    srun: list[Option] = execution_field([])
    """Options of srun for the ranks, such as `["--container-image=image.sqsh", "--cpu-bind=cores"]`."""
    umask: str | None = execution_field(None, pattern="^0?[0-7]{3}$")
    """umask of the run's files, such as `"007"` for a run that a group shares."""
    submit_from_jobs: bool = execution_field(True)
    """Whether jobs may call sbatch; if not, the gate prints the command to run."""
    max_submissions: Count = execution_field(3)
    """Maximum number of submissions of a phase before a user must call `resume`. Unit: submissions."""
    max_requeues: int = execution_field(20, ge=0)
    """Maximum number of restarts of a job, for any reason, up to which it requeues itself. Unit: restarts."""

    def job_values(self, kind: str) -> dict[str, Any]:
        """Return the keys of a kind of job, not validated: the common keys, overridden by those of this kind."""
        common = {key: getattr(self, key) for key in SlurmJobConfig.model_fields}
        own = getattr(self, kind)
        extra = self.extra
        if kind == "gate":
            common |= GATE_DEFAULTS
            extra = [option for option in extra if not option.startswith(RESOURCE_OPTIONS)]
        more = own.get("extra", [])  # a value of another type is refused when the keys are validated
        return {**common, **own, "extra": [*extra, *more] if isinstance(more, list) else more}

    @property
    def in_container(self) -> bool:
        """Return whether the ranks run in a container, in which Slurm's commands may be missing."""
        return self.container is not None or any(option.startswith("--container") for option in self.srun)

    def job(self, kind: str) -> SlurmJobConfig:
        """Return the resources of a kind of job: the common keys, overridden by those of this kind.

        Args:
            kind: One of ``JOB_KINDS``.
        """
        return SlurmJobConfig.model_validate(self.job_values(kind))
