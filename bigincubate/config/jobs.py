"""The table ``[slurm]``: how ``submit`` makes jobs, and what each asks for."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from .sections import Count, Section, execution


class SlurmJob(Section):
    """What a job asks of Slurm; what is None is left to the site's defaults."""

    nodes: Count = execution(1)
    ranks: Count = execution(1)  # on each node; one a GPU
    gpus: int = execution(0, ge=0)  # on each node
    cpus: Count | None = execution(None)  # for each rank
    memory: str | None = execution(None)  # of each node: "64G"
    time: str | None = execution(None)  # "2-00:00:00"; what is not done by then is requeued
    partition: str | None = execution(None)
    account: str | None = execution(None)
    qos: str | None = execution(None)
    constraint: str | None = execution(None)
    extra: list[str] = execution([])  # further options of sbatch: ["--exclusive"]


class Slurm(SlurmJob):
    """How ``submit`` makes jobs. ``[slurm.incubate]`` and the like come over the common keys."""

    pretrain: dict[str, Any] = execution({})
    incubate: dict[str, Any] = execution({})
    finetune: dict[str, Any] = execution({})
    end_to_end: dict[str, Any] = execution({})
    gate: dict[str, Any] = execution({})
    concurrency: Count | None = execution(None)  # array tasks that run at the same time
    prelude: str | None = execution(None)  # a file that jobs source first: modules, conda, proxies
    python: str | None = execution(None)  # None: the interpreter that submits
    container: str | None = execution(None)  # put before python: "apptainer exec --nv image.sif"
    umask: str | None = execution(None, pattern="^0?[0-7]{3}$")  # "007": a run that a group shares
    self_submit: bool = execution(True)  # whether jobs may call sbatch; false: the gate says what to type
    rounds: Count = execution(3)  # times that a phase is submitted before a person must look
    restarts: int = execution(20, ge=0)  # times that a job requeues itself

    @model_validator(mode="after")
    def _jobs(self) -> Slurm:
        for kind in ("pretrain", "incubate", "finetune", "end_to_end", "gate"):
            self.job(kind)
        return self

    def job(self, kind: str) -> SlurmJob:
        """The common keys with those of a kind of job over them."""
        common = {key: getattr(self, key) for key in SlurmJob.model_fields}
        alone: dict[str, Any] = (
            {"nodes": 1, "ranks": 1, "gpus": 0, "memory": None, "extra": []} if kind == "gate" else {}
        )
        try:
            return SlurmJob.model_validate({**common, **alone, **getattr(self, kind)})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"slurm.{kind}.{key}: {first['msg']}") from None
