"""The log of finished trials, one line each, so that an interrupted set can resume; and the page of their results.

``FAULTS=full`` in the environment runs complete sets, each for at most ``FAULTS_MINUTES`` (60). Their trials are kept
in ``build/faults`` until the code of the package changes. Otherwise a few trials of each run, and nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scenarios import BY_KEY, SCENARIOS

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("FAULTS") == "full"
MINUTES = float(os.environ.get("FAULTS_MINUTES", "60"))
RESULTS, PAGE = Path(__file__).with_name("results.json"), ROOT / "docs" / "reliability.md"


def source() -> str:
    """Return the SHA-256 of the package that the trials run."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "bigincubate").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Trial:
    """One trial of a scenario. ``random`` depends on nothing but the scenario, its seed and the trial's number."""

    def __init__(self, key: str, seed: int, number: int) -> None:
        self.number, self.random = number, random.Random(f"{key} {seed} {number}")
        self.notes: dict[str, float] = {}

    def note(self, **figures: float) -> None:
        """Record figures of this trial; an underscore stands for a blank."""
        self.notes |= {name.replace("_", " "): value for name, value in figures.items()}


class TrialLog:
    """The trials of a scenario. A failure is kept, and raised at the end."""

    def __init__(self, key: str) -> None:
        self.scenario, self.file = BY_KEY[key], ROOT / "build" / "faults" / f"{key}.jsonl"
        self.lines: dict[int, dict[str, Any]] = {}
        if FULL:
            self.lines = {line["trial"]: line for line in read(key)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self.lines:
                self.file.write_text(json.dumps({"source": source(), "seed": self.scenario.seed}) + "\n")

    def trials(self) -> Iterator[Trial]:
        """Yield the trials that are not done yet, as long as there is time."""
        end = time.monotonic() + 60 * MINUTES
        for number in range(self.scenario.full if FULL else self.scenario.few):
            if number not in self.lines and time.monotonic() < end:
                yield Trial(self.scenario.key, self.scenario.seed, number)

    @contextmanager
    def keep(self, trial: Trial) -> Iterator[None]:
        failure = None
        try:
            yield
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        line = {"trial": trial.number, "failure": failure, **trial.notes}
        self.lines[trial.number] = line
        if FULL:
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def check(self) -> None:
        failed = [f"trial {line['trial']}: {line['failure']}" for line in self.lines.values() if line["failure"]]
        assert not failed, "\n".join([f"{len(failed)} of {len(self.lines)} failed", *failed[:20]])
        assert self.lines


def read(key: str) -> list[dict[str, Any]]:
    """Return the kept trials of a scenario; none if they are of other code or another seed."""
    file = ROOT / "build" / "faults" / f"{key}.jsonl"
    if not file.exists():
        return []
    head, *lines = (json.loads(line) for line in file.read_text().splitlines())
    return lines if head == {"source": source(), "seed": BY_KEY[key].seed} else []


# ------------------------------------------------------------------------------------------------ the page


def collect() -> dict[str, Any]:
    """Return the results, with those of scenarios that have kept trials brought up to date."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for scenario in SCENARIOS:
        if lines := read(scenario.key):
            sums: Counter[str] = Counter()
            for line in lines:
                sums.update({name: line[name] for name in scenario.total if name in line})
            shown = {f"max {name}": max(line[name] for line in lines if name in line) for name in scenario.most}
            results[scenario.key] = {
                "done": len(lines),
                "good": sum(not line["failure"] for line in lines),
                "of": scenario.full,
                "seed": scenario.seed,
                "code": source(),
                "figures": {**dict(sums), **shown},
                "failures": [line["failure"][:300] for line in lines if line["failure"]][:3],
            }
    return results


HEAD = """# Reliability: fault-injection results

Each row of the table is one kind of fault. The sections below say what each trial does and which requirement must be
met afterwards; a trial passes if it is met. The columns:

- *passed*: number of trials that passed, of those that were run.
- *run*: number of trials that were run, of those that are planned.
- *seed*: trials draw their random numbers from this seed.
- *code*: first digits of the SHA-256 of the package that was tested.
- *figures*: sums over the trials; with `max`, the maximum.

The benchmark `python benchmarks/fault_cost.py` measures what hashing and fsync cost. In the last measurement they took
17% and 38% of the time of a save of 256 MiB.

`make test-faults` runs the trials and writes this page from `tests/faults/results.json`. If it is interrupted, run it
again to resume. `make test` runs some of the trials.

| fault | passed | run | seed | code | figures |
| --- | --- | --- | --- | --- | --- |
"""


WAITS = """
## Waits for other processes

No process waits forever for another one. After the limit, it ends with one line that says what to do, and with exit
code 3 unless the table says otherwise.

| process | waits for | limit |
| --- | --- | --- |
| rank | batches of its loader workers | a worker that ends: at once; without a batch: 1,800 s |
| rank | the other ranks: connecting, collectives, barriers | 1,800 s; a rank that does not respond: 18 s |
| rank | a lock on shards that another process of the node downloads or verifies | 1,800 s |
| rank | a shared loader (`--co-train`) | 180 s, then it uses its own loader |
| any | the heartbeat of the previous owner of a phase | 60 s, then it takes over, or exits with code 7 |
| launcher | the other ranks after the first one has ended | 20 s, then they are killed |
| launcher | the checkpoints of ranks that were asked to stop | 1,800 s; a suspended rank: 10 s; then they are killed |
| launcher | helper processes at the end | 20 s, then they are left behind |
| any | a program of Slurm (`sbatch`, `squeue`, `scontrol`, `scancel`) | 120 s |
| gate | `scontrol requeue` of itself | 20 attempts in 10 minutes |
| `data prepare` | its processes | 3,600 s without a finished chunk of 2,048 images |
| `data prepare` | another process that prepares the same folder | 86,400 s |

A phase itself has no limit: training takes as long as it takes. Calls to a file system that does not respond block in
the kernel, and cannot be given a limit.
"""


def page(results: dict[str, Any]) -> str:
    text = HEAD
    for scenario in SCENARIOS:
        if (found := results.get(scenario.key)) is None:
            text += f"| {scenario.title} | not run | | | | |\n"
            continue
        figures = ", ".join(f"{name}: {value:,}" for name, value in found["figures"].items())
        held, done = f"{found['good']:,} of {found['done']:,}", f"{found['done']:,} of {found['of']:,}"
        text += f"| {scenario.title} | {held} | {done} | {found['seed']} | `{found['code']}` | {figures} |\n"
    for scenario in SCENARIOS:
        text += f"\n## {scenario.title[0].upper() + scenario.title[1:]}\n\n{scenario.what}\n"
        text += f"\n**Requirement:** {scenario.must}.\n"
        for failure in results.get(scenario.key, {}).get("failures", []):
            text += f"\n**Failed:** {failure}\n"
    return text + WAITS


def publish() -> None:
    results = collect()
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    publish()
