"""Finished trials, a line each, so that a set that was cut short goes on; and the page that they make.

``FAULTS=full`` in the environment: whole sets, each for at most ``FAULTS_MINUTES`` (60) and kept in ``build/faults``
for as long as the code is what it was. Otherwise a few trials of each, of which nothing is kept.
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

from rows import BY_KEY, ROWS

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("FAULTS") == "full"
MINUTES = float(os.environ.get("FAULTS_MINUTES", "60"))
RESULTS, PAGE = Path(__file__).with_name("results.json"), ROOT / "docs" / "reliability.md"


def source() -> str:
    """What the figures are about: SHA-256 of the package."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "bigincubate").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Trial:
    """One of a row: ``random`` is its own, whatever ran before it."""

    def __init__(self, row: str, seed: int, number: int) -> None:
        self.number, self.random = number, random.Random(f"{row} {seed} {number}")
        self.notes: dict[str, float] = {}

    def note(self, **figures: float) -> None:
        """Figures of this trial; an underscore stands for a blank."""
        self.notes |= {name.replace("_", " "): value for name, value in figures.items()}


class Ledger:
    """The trials of a row. A failure is kept, and raised at the end."""

    def __init__(self, key: str) -> None:
        self.row, self.file = BY_KEY[key], ROOT / "build" / "faults" / f"{key}.jsonl"
        self.lines: dict[int, dict[str, Any]] = {}
        if FULL:
            self.lines = {line["trial"]: line for line in read(key)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self.lines:
                self.file.write_text(json.dumps({"source": source(), "seed": self.row.seed}) + "\n")

    def trials(self) -> Iterator[Trial]:
        """Those that are left, while there is time."""
        end = time.monotonic() + 60 * MINUTES
        for number in range(self.row.full if FULL else self.row.few):
            if number not in self.lines and time.monotonic() < end:
                yield Trial(self.row.key, self.row.seed, number)

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
    """The trials kept of a row; none where they are of other code or another seed."""
    file = ROOT / "build" / "faults" / f"{key}.jsonl"
    if not file.exists():
        return []
    head, *lines = (json.loads(line) for line in file.read_text().splitlines())
    return lines if head == {"source": source(), "seed": BY_KEY[key].seed} else []


# ------------------------------------------------------------------------------------------------ the page


def collect() -> dict[str, Any]:
    """Results with the rows brought up to date that have trials."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in ROWS:
        if lines := read(row.key):
            sums: Counter[str] = Counter()
            for line in lines:
                sums.update({name: line[name] for name in row.total if name in line})
            shown = {f"most {name}": max(line[name] for line in lines if name in line) for name in row.most}
            results[row.key] = {
                "done": len(lines),
                "good": sum(not line["failure"] for line in lines),
                "of": row.full,
                "seed": row.seed,
                "code": source(),
                "figures": {**dict(sums), **shown},
                "failures": [line["failure"][:300] for line in lines if line["failure"]][:3],
            }
    return results


HEAD = """# Reliability: what was done to it, and what came of it

This page is written by `make test-faults` from `tests/faults/results.json`: how often each fault was tried, of how many
planned trials, and how often what must hold did hold. A part of each set runs with every `make test`. Trials are drawn
from a seed; `code` is the SHA-256 of the package that they ran with. Cut short, the same command goes on.

| fault | held | done of planned | seed | code | figures |
| --- | --- | --- | --- | --- | --- |
"""


def page(results: dict[str, Any]) -> str:
    text = HEAD
    for row in ROWS:
        if (found := results.get(row.key)) is None:
            text += f"| {row.title} | not run | | | | |\n"
            continue
        figures = ", ".join(f"{name}: {value:,}" for name, value in found["figures"].items())
        held, done = f"{found['good']:,} of {found['done']:,}", f"{found['done']:,} of {found['of']:,}"
        text += f"| {row.title} | {held} | {done} | {found['seed']} | `{found['code']}` | {figures} |\n"
    for row in ROWS:
        text += f"\n## {row.title[0].upper() + row.title[1:]}\n\n{row.what}\n\nMust hold: {row.must}.\n"
        for failure in results.get(row.key, {}).get("failures", []):
            text += f"\nDid not hold: {failure}\n"
    return text


def publish() -> None:
    results = collect()
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    publish()
