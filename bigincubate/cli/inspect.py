"""Commands that inspect a run, the shipped recipes, or this machine."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, Exit, format_count
from .app import JsonOption, RunArgument, app, console, fail, say, say_json


@app.command()
def status(
    run: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, Option(help="Refresh every 2 s until Ctrl-C; ask Slurm every 30 to 60 s.")] = False,
) -> None:
    """Show the status of a run: state, step, loss, speed and remaining time of every phase."""
    from rich.live import Live

    from ..report.console_tables import status_table
    from ..report.status import QueueReader, read_plan, run_status

    queue = QueueReader(run)

    def table() -> Any:
        return status_table(str(run.path), run_status(run, lambda _: queue.read()), read_plan(run))

    if as_json:
        say_json(run_status(run))
    elif not watch:
        console().print(table())
    else:
        with suppress(KeyboardInterrupt), Live(table(), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(2)
                live.update(table(), refresh=True)


@app.command()
def verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Hash every file of a run and report which parts are valid, damaged, stale or in progress.

    The exit code is 6 if a part is damaged, 4 if a part is stale.
    """
    from ..report.verify import Verdict, verify_run

    findings = []
    for finding in verify_run(run):
        findings.append(finding)
        if not as_json:
            reason = f": {finding.why}" if finding.why else ""
            say(f"{finding.verdict:<14}{finding.part:<12}{finding.path}{reason}")
    if as_json:
        say_json([{**asdict(finding), "path": str(finding.path)} for finding in findings])
    for verdict, code in ((Verdict.DAMAGED, Exit.DAMAGED), (Verdict.STALE, Exit.ARTIFACT)):
        if count := sum(finding.verdict is verdict for finding in findings):
            found = f"{verdict}: {count} of {format_count(len(findings), 'part')}"
            fail(f"{found}, see the list above; the others are not affected", code)


@app.command()
def recipes(
    pattern: Annotated[
        str | None, Argument(metavar="[PATTERN]", help="With --keys: part of a key, or a pattern such as 'train.*'.")
    ] = None,
    keys: Annotated[bool, Option("--keys", help="List every recipe key and its meaning.")] = False,
    markdown: Annotated[
        bool, Option("--markdown", help="With --keys: print Markdown, the page docs/recipe_keys.md.")
    ] = False,
) -> None:
    """List the recipes that come with the package, or the keys that a recipe may have."""
    from ..config import format_recipe_keys, list_recipe_keys, list_shipped_recipes, load_recipe

    if not keys and (pattern or markdown):
        raise ConfigError("PATTERN and --markdown need --keys, such as: bigincubate recipes --keys 'train.*'")
    if keys:
        found = list_recipe_keys(pattern)
        print(format_recipe_keys(found) if markdown else "\n".join(map(str, found)))
        return
    width = max(map(len, list_shipped_recipes())) + 1
    for name, file in list_shipped_recipes().items():
        say(f"{name:<{width}} {load_recipe(name).description}\n{'':<{width}} {file}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show which packages and programs are installed or missing, and what each is used for."""
    from .doctor_checks import examine

    checks = list(examine())
    if as_json:
        say_json(checks)
    else:
        for check in checks:
            say(f"{'ok' if check['ok'] else 'missing' if check['needed'] else 'optional':<9}{check['text']}")
    if any(check["needed"] and not check["ok"] for check in checks):
        raise SystemExit(Exit.ENVIRONMENT)
