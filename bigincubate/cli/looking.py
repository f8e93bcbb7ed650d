"""Commands that look: at a run, at the recipes, at this machine."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from ..errors import Exit
from .app import JsonOption, RunArgument, app, console, say


@app.command()
def status(
    run_dir: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option(help="Again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Where a run stands: state, step, loss, speed and time left of every phase."""
    from ..cluster.status import run_status
    from ..rundir import RunDir

    directory = RunDir(run_dir)
    if as_json:
        print(json.dumps(run_status(directory), indent=1))
        return
    from rich.live import Live

    from ..tables import status_table

    def table() -> Any:
        return status_table(str(run_dir), run_status(directory))

    if not watch:
        console().print(table())
        return
    with Live(table(), console=console(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(2)
                live.update(table(), refresh=True)
        except KeyboardInterrupt:
            pass


@app.command()
def recipes() -> None:
    """The recipes that come with the package."""
    from ..config import load_recipe, shipped

    for name, file in shipped().items():
        say(f"{name:<20} {load_recipe(name).description}\n{'':<20} {file}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed, what is missing, and why it matters."""
    from ..doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps(checks, indent=1))
    else:
        for check in checks:
            say(f"{'ok' if check['ok'] else 'missing' if check['needed'] else 'optional':<9}{check['text']}")
    if any(check["needed"] and not check["ok"] for check in checks):
        raise typer.Exit(Exit.ENVIRONMENT)
