"""One attempt at a phase: who owns it, what is noted of it, how it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import Recipe
from ..data.dataset import DatasetInfo
from ..distributed.process_group import RunEnv
from ..distributed.signals import StopFlag
from ..distributed.watchdog import watched
from ..errors import BigincubateError, EnvironmentFault, Preempted
from ..planning.phases import PhasePlan, Plan, PlannedRow
from ..storage.lease import owned
from ..storage.run_directory import RunDir
from .trainer import Trainer


def train(
    recipe: Recipe,
    plan: Plan,
    row: PhasePlan,
    planned: PlannedRow,
    run: RunDir,
    data: DatasetInfo,
    env: RunEnv,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Run one phase to its end, from its last checkpoint where there is one, and hand on its artifact.

    Args:
        start: weights to begin with instead of the row's own, as `ClassificationTask.build_model` takes them.

    Returns:
        The phase's result: ``top1``, ``top5`` (percent), ``loss``, ``seconds``, ``images``, ``flops``, ``steps``.

    Raises:
        Preempted: asked to stop; a checkpoint is there.
        NonFiniteError: more steps than allowed had a gradient that is not finite, again after a rollback.
        LockedError: another live process trains this phase, or has taken it over.
    """
    folder = run.phase(row.phase, row.module)
    if (result := env.broadcast(folder.result)) is not None:
        return result
    with owned(folder.path, env) as claim, StopFlag() as stop:
        attempt = env.broadcast(1 + max((before["attempt"] for before in folder.attempts()), default=0))
        about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        strategy = recipe.settings(row.phase).sharding.strategy
        main = {**env.broadcast({**about, **env.machine()}), "sharding": strategy, "steps": planned.steps}

        def note(state: str, **more: Any) -> None:
            folder.record(attempt, state=state, **main, **more)

        def record(state: str, **more: Any) -> None:
            if env.is_main:
                note(state, **more)

        record("running")
        try:
            with watched(env, f"{folder.path}/{attempt}", about, lambda reason: note("failed", error=reason)):
                try:
                    result = Trainer(recipe, plan, row, planned, run, data, env, stop, claim, start).run()
                except (OSError, EnvironmentFault):
                    claim.check()  # an heir may have taken away what was missed
                    raise
        except Preempted:
            record("preempted")
            raise
        except BaseException as error:
            record("failed", error=str(error) if isinstance(error, BigincubateError) else repr(error))
            raise
        with env.first():
            if env.is_main:
                claim.check()
                folder.finish(result)
        if env.is_main:
            run.note("done", phase=row.key, **{key: result[key] for key in ("top1", "steps", "seconds")})
        record("done")
        env.barrier()
    return result
