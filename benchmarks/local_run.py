"""Measure what a local run needs apart from training, with phases from a fork server and with new processes, in turns.

``python benchmarks/local_run.py --turns 10 --jobs 1`` runs ``digits`` both ways and prints, as medians and ranges: the
seconds of one start (the imports of a phase), the seconds of the run, those of its schedule (computed from the training
seconds of its phases), and what remains. ``--set`` shortens the phases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = "from bigincubate.launchers import fork_server_process as server, local; import importlib\n"
IMPORTS = START + "for module in server.MODULES: importlib.import_module(module)"
RUN = {
    "fork server": START + "from bigincubate.cli import main; main()",
    "new processes": START + "local.can_fork = lambda *_: False\nfrom bigincubate.cli import main; main()",
}
DONE = ("meta/DONE", "modules/*/DONE", "finetune/DONE")


def seconds_of(code: str, *arguments: str) -> float:
    """Return the wall-clock seconds of a new process."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    return time.perf_counter() - start


def schedule(phases: list[list[float]], jobs: int) -> float:
    """Return the seconds of groups of phases of which each needs the one before, if ``jobs`` phases run in parallel."""
    total = 0.0
    for group in phases:
        ends = [0.0] * min(jobs, len(group))
        for seconds in group:
            ends[ends.index(min(ends))] += seconds
        total += max(ends)
    return total


def training_seconds(run: Path) -> list[list[float]]:
    """Return the training seconds of the phases of a run: meta model, modules, fine-tuning."""
    results: list[list[Any]] = [[json.loads(path.read_text()) for path in sorted(run.glob(name))] for name in DONE]
    return [[float(result["seconds"]) for result in group] for group in results]


def main() -> None:
    """Print a table with one row per way of starting phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    sets = [word for setting in options.set for word in ("--set", setting)]
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in RUN}
    with tempfile.TemporaryDirectory() as folder:
        first = str(Path(folder, "first"))
        prepare = ["run", "digits", "--run-dir", first, "--set", "train.max_steps=50"]  # writes the data
        subprocess.run([sys.executable, "-m", "bigincubate", *prepare], check=True, capture_output=True)
        for turn in range(options.turns):
            for name, code in RUN.items():
                run = Path(folder, f"{turn}-{name.split()[0]}")
                shutil.copytree(Path(first, "data"), run / "data")
                start = seconds_of(IMPORTS)
                arguments = ["run", "digits", "--run-dir", str(run), "--jobs", str(options.jobs), *sets]
                wall = seconds_of(code, *arguments)
                rows[name].append((start, wall, schedule(training_seconds(run), options.jobs)))
                print(name, *(f"{value:.2f}" for value in rows[name][-1]), file=sys.stderr, flush=True)
    print("| phases from | start, s | run, s | schedule, s | run minus schedule and one start, s | run / schedule |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, values in rows.items():
        rests = [wall - seconds - start for start, wall, seconds in values]
        ratios = [(wall - start) / seconds for start, wall, seconds in values]
        medians = [statistics.median(column) for column in zip(*values, strict=True)]
        shown = " | ".join(f"{value:.1f}" for value in medians)
        rest = f"{statistics.median(rests):.1f} ({min(rests):.1f} to {max(rests):.1f})"
        print(
            f"| {name} | {shown} | {rest} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
