"""The table ``[slurm]``: how ``submit`` makes jobs, and which resources each kind of job requests."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from .sections import ConfigTable, Count, execution_field


class SlurmJobConfig(ConfigTable):
    """The resources that a job requests from Slurm. What is None is left to the defaults of the site."""

    nodes: Count = execution_field(1)
    ranks: Count = execution_field(1)  # per node; one per GPU
    gpus: int = execution_field(0, ge=0)  # per node
    cpus: Count | None = execution_field(None)  # per rank
    memory: str | None = execution_field(None)  # per node: "64G"
    time: str | None = execution_field(None)  # time limit, "2-00:00:00"; a job that is not done by then is requeued
    partition: str | None = execution_field(None)
    account: str | None = execution_field(None)
    qos: str | None = execution_field(None)
    constraint: str | None = execution_field(None)
    extra: list[str] = execution_field([])  # more options of sbatch: ["--exclusive"]


class SlurmConfig(SlurmJobConfig):
    """How ``submit`` makes jobs. Tables such as ``[slurm.incubate]`` override the common keys for one kind of job."""

    pretrain: dict[str, Any] = execution_field({})
    incubate: dict[str, Any] = execution_field({})
    finetune: dict[str, Any] = execution_field({})
    end_to_end: dict[str, Any] = execution_field({})
    gate: dict[str, Any] = execution_field({})
    array_parallelism: Count | None = execution_field(None)  # array tasks that run in parallel; None: no limit
    setup_script: str | None = execution_field(None)  # a script that jobs source first: modules, conda, proxies
    python: str | None = execution_field(None)  # None: the interpreter that submits
    container: str | None = execution_field(None)  # a prefix of the python command: "apptainer exec --nv image.sif"
    umask: str | None = execution_field(None, pattern="^0?[0-7]{3}$")  # "007": a run that a group shares
    submit_from_jobs: bool = execution_field(True)  # false: jobs may not call sbatch; the gate prints what to do
    max_submissions: Count = execution_field(3)  # how often a phase is submitted before a user must call `resume`
    max_requeues: int = execution_field(20, ge=0)  # how often a job requeues itself

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
