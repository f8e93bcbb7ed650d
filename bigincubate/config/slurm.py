"""The table ``[slurm]``: how ``submit`` makes jobs, and which resources each kind of job requests."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from .sections import ConfigTable, Count, execution_field


class SlurmJobConfig(ConfigTable):
    """The resources that a job requests from Slurm. What is None is left to the defaults of the site."""

    nodes: Count = execution_field(1)
    """Nodes of a job. Unit: nodes."""
    ranks: Count = execution_field(1)
    """Ranks per node, one per GPU. Unit: ranks."""
    gpus: int = execution_field(0, ge=0)
    """GPUs per node. Unit: GPUs."""
    cpus: Count | None = execution_field(None)
    """CPU cores per rank. Unit: cores."""
    memory: str | None = execution_field(None)
    """Memory per node, with its unit, such as `"64G"`."""
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
    extra: list[str] = execution_field([])
    """More options of sbatch, such as `["--exclusive"]`."""


class SlurmConfig(SlurmJobConfig):
    """How ``submit`` makes jobs. Tables such as ``[slurm.incubate]`` override the common keys for one kind of job."""

    pretrain: dict[str, Any] = execution_field({})
    """Resources of the meta model's job, where they differ from the common keys."""
    incubate: dict[str, Any] = execution_field({})
    """Resources of each task of the array of modules, where they differ from the common keys."""
    finetune: dict[str, Any] = execution_field({})
    """Resources of the fine-tuning job, where they differ from the common keys."""
    end_to_end: dict[str, Any] = execution_field({})
    """Resources of the baseline's job, where they differ from the common keys."""
    gate: dict[str, Any] = execution_field({})
    """Resources of the gate, where they differ from one node and one rank without GPU."""
    array_parallelism: Count | None = execution_field(None)
    """Array tasks that run in parallel. None: no limit. Unit: tasks."""
    setup_script: str | None = execution_field(None)
    """Script that jobs source first: environment modules, conda, proxies."""
    python: str | None = execution_field(None)
    """Python interpreter of the jobs. None: the one that submits."""
    container: str | None = execution_field(None)
    """Prefix of the python command, such as `"apptainer exec --nv image.sif"`."""
    umask: str | None = execution_field(None, pattern="^0?[0-7]{3}$")
    """File mode mask of the run, such as `"007"` for a run that a group shares."""
    submit_from_jobs: bool = execution_field(True)
    """Let jobs call sbatch; false: the gate prints the command to run."""
    max_submissions: Count = execution_field(3)
    """How often a phase is submitted before a user must call `resume`. Unit: submissions."""
    max_requeues: int = execution_field(20, ge=0)
    """How often a job requeues itself. Unit: requeues."""

    @model_validator(mode="after")
    def _validate_jobs(self) -> SlurmConfig:
        for kind in ("pretrain", "incubate", "finetune", "end_to_end", "gate"):
            self.job(kind)
        return self

    def job(self, kind: str) -> SlurmJobConfig:
        """Return the resources of a kind of job: its own keys over the common ones.

        Args:
            kind: ``pretrain``, ``incubate``, ``finetune``, ``end_to_end`` or ``gate``.

        Raises:
            ValueError: If a key is wrong.
        """
        common = {key: getattr(self, key) for key in SlurmJobConfig.model_fields}
        gate: dict[str, Any] = {"nodes": 1, "ranks": 1, "gpus": 0, "memory": None, "extra": []}
        defaults = common | (gate if kind == "gate" else {})
        try:
            return SlurmJobConfig.model_validate({**defaults, **getattr(self, kind)})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"slurm.{kind}.{key}: {first['msg']}") from None
