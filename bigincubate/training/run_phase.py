"""Run one attempt at a phase: acquire its lease, record the attempt in ``attempts/``, write the result."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..data.workers import explain_worker_failures
from ..distributed.signals import StopFlag
from ..distributed.watchdog import watch_ranks
from ..errors import BigincubateError, ExternalError, Preempted
from ..interchange.trackers.background import track_in_background
from ..planning.context import PhaseContext
from ..planning.prepare_run import check_plan_unchanged
from ..storage.lease import NO_JOBS, JobQueue, acquire_lease
from .trainer import Trainer


def train_phase(
    context: PhaseContext, start: Mapping[str, Tensor] | None = None, *, queue: JobQueue = NO_JOBS
) -> dict[str, Any]:
    """Train one phase to the end and write its artifact. Resumes from the last checkpoint if there is one.

    Args:
        context: The phase.
        start: Initial weights that replace those of the phase; see :func:`build_model`.
        queue: The batch system that may have started this process, for leases.

    Returns:
        The phase's result; see :meth:`Task.make_result`.

    Raises:
        ConfigError: Another process has replaced the recipe of the run.
        Preempted: A stop signal was received, and a checkpoint was written.
        NonFiniteError: The gradient was not finite in more steps than allowed, also after a rollback.
        LockedError: Another process is training this phase, or has taken it over.
    """
    folder, env, run = context.folder, context.env, context.run
    if (result := env.broadcast(folder.result)) is not None:
        return result
    with acquire_lease(folder.path, env, queue) as lease, StopFlag() as stop:
        with env.main_process_first():
            if env.is_main:
                check_plan_unchanged(run, context.planned)
        attempt = env.broadcast(1 + max((before["attempt"] for before in folder.read_attempts()), default=0))
        about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        layout = {"sharding": context.settings.sharding.strategy, "steps": context.planned.steps}
        main = {**env.broadcast({**about, **env.describe_machine()}), **layout}

        def note(state: str, **more: Any) -> None:
            folder.write_attempt(attempt, state=state, **main, **more)

        def record(state: str, **more: Any) -> None:
            if env.is_main:
                note(state, **more)

        record("running")
        if env.is_main:
            folder.write_stragglers([])  # removes those of an earlier attempt
        trackers = context.recipe.log.trackers if env.is_main else ()
        with track_in_background(run, folder, context.row.key, trackers):
            try:
                with watch_ranks(
                    env,
                    f"{folder.path}/{attempt}",
                    about,
                    lambda reason: note("failed", error=reason),
                    folder.path / "flight_recorder" / str(attempt),
                    context.recipe.log.straggler_share,
                ) as stragglers:
                    try:
                        with explain_worker_failures():
                            result = Trainer.build(context, stop, lease, start, stragglers).run()
                    except (OSError, ExternalError):
                        lease.check()  # the error may be due to a new owner that removed files
                        raise
            except Preempted:
                record("preempted")
                raise
            except BaseException as error:
                record("failed", error=str(error) if isinstance(error, BigincubateError) else repr(error))
                raise
            with env.main_process_first():
                if env.is_main:
                    lease.check()
                    folder.write_result(result)
            if env.is_main:
                summary = {key: result[key] for key in ("metrics", "steps", "seconds")}
                run.log_event("done", phase=context.row.key, **summary)
            record("done")
        env.barrier()
    return result
