"""Run one rank's server. Started by ``bigincubate run --co-train``, one process per rank."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from ...config import load_recipe
from ...distributed.parent_death import stop_with_parent
from ...distributed.signals import StopFlag
from ...errors import BigincubateError, ConfigError, format_count
from . import SERVER_NAME
from .fd_socket import listen


def serve(recipe_file: str, run_dir: Path, clients: int) -> None:
    """Load the batches of this rank and send them to the modules until all of them have disconnected.

    Args:
        recipe_file: The recipe of the run.
        run_dir: The directory of the run.
        clients: Number of modules to expect.
    """
    if SERVER_NAME not in os.environ:
        raise ConfigError(f"{SERVER_NAME} is not set: start the shared loader with `bigincubate run --co-train`")
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    with StopFlag() as stop, listen(os.environ[SERVER_NAME], rank) as listener:  # before any module connects
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops after the modules
        stop_with_parent()
        recipe = load_recipe(recipe_file)
        from ...planning.context import open_run
        from ...storage.run_directory import RunDir
        from .client import batch_digest
        from .server import SharedLoaderServer

        run = RunDir(run_dir)
        opened = open_run(recipe, run)
        steps = max(row.steps for row in opened.rows if row.phase == "incubate")
        with opened.phase("incubate", opened.plan.incubated[0]).with_local_data() as context:
            stream = context.task.train_stream(context.data, rank=rank, world=world)
            digest = batch_digest(context, rank, world)
            server = SharedLoaderServer(listener, stream, digest, clients=clients, steps=steps)
            server.serve(lambda: stop)
    print(f"{format_count(server.batches_made, 'batch')} made, {server.batches_sent:,} sent", flush=True)
    if rank == 0:
        run.log_event("shared_loader", made=server.batches_made, sent=server.batches_sent)


def main() -> None:
    """Parse the command line and run the server; print known errors in one line and exit with their code."""
    parser = argparse.ArgumentParser(prog="python -m bigincubate.experimental.shared_loader", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--clients", type=int, required=True, help="number of modules")
    arguments = parser.parse_args()
    try:
        serve(arguments.recipe, arguments.run_dir, arguments.clients)
    except BigincubateError as error:
        print(f"bigincubate: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.code) from None


main()
