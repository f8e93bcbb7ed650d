"""The command that copies metrics to an experiment tracker."""

from __future__ import annotations

import time
from typing import Annotated, get_args

from typer import Option

from ..errors import ConfigError
from .app import RunArgument, app, say

FOLLOW_SECONDS = 5.0


@app.command()
def track(
    run: RunArgument,
    to: Annotated[str, Option(help="wandb, mlflow or csv.", metavar="TRACKER")],
    out: Annotated[
        str | None,
        Option(metavar="DIR|URI", help="Folder for W&B's offline files or the CSV files, or MLflow's tracking URI."),
    ] = None,
    project: Annotated[str | None, Option(metavar="NAME", help="Project of W&B, experiment of MLflow.")] = None,
    follow: Annotated[bool, Option("--follow", help="Continue until the run is finished.")] = False,
) -> None:
    """Send the metrics of a run, finished or not, to an experiment tracker. Run it again to send what is missing."""
    from ..config import TrackerName
    from ..interchange.trackers.registry import make_tracker
    from ..interchange.trackers.replay import Replay
    from ..interchange.trackers.replay import follow as follow_run
    from ..report.status import read_plan

    def wait() -> bool:
        time.sleep(FOLLOW_SECONDS)
        return False

    names: dict[str, TrackerName] = {name: name for name in get_args(TrackerName)}
    if to not in names:
        raise ConfigError(f"--to {to}: expected one of {', '.join(names)}")
    read_plan(run)
    tracker = make_tracker(names[to], run, out, project)
    with Replay(run, to, tracker) as replay:
        if follow:
            say(tracker.describe(replay.group))
            follow_run(replay, wait)
        else:
            replay.update()
    lines = list(replay.summary())
    say("\n".join([*lines, tracker.describe(replay.group)]) if lines else "no metrics yet")
