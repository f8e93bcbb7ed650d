"""Commands for resume checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import ArtifactError, DamagedError, format_count
from .app import MAX_COUNT, CheckpointsArgument, JsonOption, checkpoint_app, console, parse_path, say, say_json


@checkpoint_app.command("list")
def checkpoint_list(folder: CheckpointsArgument, as_json: JsonOption = False) -> None:
    """List checkpoints: step, ranks, bytes, time, and whether they are committed and match their hashes."""
    from ..report.console_tables import checkpoint_table
    from ..storage.checkpoint_tools import list_checkpoints

    rows = list_checkpoints(folder)
    if as_json:
        say_json(rows)
    else:
        console().print(checkpoint_table(str(folder), rows))


@checkpoint_app.command("verify")
def checkpoint_verify(folder: CheckpointsArgument) -> None:
    """Hash every file of every committed checkpoint. The exit code is 6 if one is damaged."""
    from ..files import quote_path
    from ..storage.checkpoint_tools import list_checkpoints

    rows = [row for row in list_checkpoints(folder) if row["committed"]]
    if not rows:
        raise ArtifactError(f"{quote_path(folder)} has no committed checkpoint")
    for row in rows:
        if row["problem"] is None:
            say(f"valid  {row['path']}")
    if damaged := [row["problem"] for row in rows if row["problem"] is not None]:
        raise DamagedError(f"damaged: {len(damaged)} of {format_count(len(rows), 'checkpoint')}: {'; '.join(damaged)}")


@checkpoint_app.command("convert")
def checkpoint_convert(
    checkpoint: Annotated[Path, Argument(metavar="CHECKPOINT", parser=parse_path, help="A committed checkpoint.")],
    out: Annotated[Path, Argument(metavar="OUT", parser=parse_path, help="The directory to write.")],
    ranks: Annotated[
        int, Option(min=1, max=MAX_COUNT, metavar="N", help="Number of files; 1: complete tensors in one file.")
    ] = 1,
) -> None:
    """Convert a checkpoint to N files. Not needed to resume: any number of ranks can read any checkpoint."""
    from ..storage.checkpoint_tools import convert_checkpoint

    convert_checkpoint(checkpoint, out, ranks=ranks)
    say(f"{out}: converted from {checkpoint} to {format_count(ranks, 'file')}")


@checkpoint_app.command("prune")
def checkpoint_prune(
    folder: Annotated[Path, Argument(metavar="DIR", parser=parse_path, help="A run directory or a phase's directory.")],
    keep: Annotated[int, Option(min=1, help="How many of the newest valid checkpoints to keep per phase.")] = 2,
) -> None:
    """Remove old, damaged and unfinished checkpoints, except those of a phase that is being trained.

    The checkpoint before the decay of a wsd schedule is kept as well: forks of the run start from it.
    """
    from ..launchers.slurm.job_queue import SlurmQueue
    from ..storage.checkpoint_tools import prune_checkpoints

    removed = prune_checkpoints(folder, keep=keep, queue=SlurmQueue())
    say("\n".join(f"removed  {path}" for path in removed) or "nothing to remove")
