"""Check the options of ``bigincubate run --co-train``, and define the server as a helper job of the local launcher."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING

from ...errors import ConfigError, format_count
from . import SERVER_NAME

if TYPE_CHECKING:
    from ...config import Recipe
    from ...launchers.local import HelperJob
    from ...storage.run_directory import RunDir


def count_parallel_jobs(recipe: Recipe, jobs: int | None, baseline: bool) -> int:
    """Return the number of phases to run in parallel: all modules, and the baseline, which may start before them.

    Args:
        recipe: The recipe of the run.
        jobs: The value of ``--jobs``, if it is set.
        baseline: Whether the end-to-end baseline is also trained.

    Raises:
        ConfigError: Modules of this recipe cannot share a loader, or ``jobs`` is too small.
    """
    modules = len(recipe.incubated)
    needed = modules + baseline
    if not sys.platform.startswith("linux"):
        raise ConfigError("--co-train needs shared memory that only Linux supports; omit it")
    if recipe.data.decentralized:
        raise ConfigError("--co-train: with data.decentralized, each module has its own data; omit one of the two")
    if not modules:
        reason = "finetune.init is a finished model" if recipe.finetune.init else 'plan.incubate = "none"'
        raise ConfigError(f"--co-train: {reason}, so no modules share a loader; omit --co-train")
    if jobs is not None and jobs < needed:
        what = f"{format_count(modules, 'module')}{' and the baseline' if baseline else ''}"
        raise ConfigError(f"--co-train trains {what} in parallel; use --jobs {needed}, or omit --co-train")
    return jobs or needed


def shared_loader_job(run: RunDir) -> HelperJob:
    """Return the server's processes as a helper job."""
    from ...launchers.local import HelperJob
    from ...training.hooks import BATCH_SOURCE

    name = {SERVER_NAME: secrets.token_hex(16)}
    command = [sys.executable, "-m", "bigincubate.experimental.shared_loader", str(run.recipe_file)]
    return HelperJob(
        title="shared loader",
        log="shared_loader",
        command=lambda modules: [*command, "--run-dir", str(run.path), "--clients", str(modules)],
        # one thread, like the workers of a loader, and no GPU
        environment={**name, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        module_environment={**name, BATCH_SOURCE: "bigincubate.experimental.shared_loader.client:use_shared_loader"},
        fallback="each module uses its own loader",
    )
