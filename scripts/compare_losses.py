"""Compare the losses, gradient norms, scores and final weights of two runs, step by step.

    python scripts/compare_losses.py A B [--rtol X]

A and B are run directories, or files recorded by ``tests/golden/record.py``. Every phase that both have is compared.
Without ``--rtol`` all values must have the same bits, final weights included; with it, values may differ by that
relative difference and the weights' hashes are only shown. Exit codes: 0 equal, 1 different, 2 wrong usage.

Uses the standard library only, so that runs of two checkouts can be compared by either one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAGS = ("train/loss", "train/grad_norm")

Phase = dict[str, Any]


class UsageError(Exception):
    """What was given cannot be compared."""


# ------------------------------------------------------------------------------------------------ reading


def hash_weights(file: Path) -> str:
    """Return the SHA-256 of a safetensors file over its tensors sorted by name: name, dtype, shape, bytes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        begin, end = entry["data_offsets"]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        digest.update(data[start + begin : start + end])
    return digest.hexdigest()


def read_phase(folder: Path) -> Phase:
    """Return what a phase's folder says: ``steps``, a list for each of ``TAGS``, ``weights`` and ``scores``."""
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    rows = [row for row in rows if TAGS[0] in row]
    phase: Phase = {"steps": [row["step"] for row in rows]} | {tag: [row[tag] for row in rows] for tag in TAGS}
    weights = folder / "artifact" / "weights.safetensors"
    phase["weights"] = hash_weights(weights) if weights.exists() else None
    done = folder / "DONE"
    phase["scores"] = json.loads(done.read_text())["metrics"] if done.exists() else {}
    return phase


def read_run(path: Path) -> dict[str, Phase]:
    """Return the phases of a run directory by their folder, or those of a golden file.

    Raises:
        UsageError: Missing, or neither of the two.
    """
    if path.is_dir():
        files = [*path.rglob("metrics.jsonl"), *path.rglob("artifact/weights.safetensors")]
        folders = {file.parent if file.name == "metrics.jsonl" else file.parent.parent for file in files}
        phases = {folder.relative_to(path).as_posix(): read_phase(folder) for folder in sorted(folders)}
    else:
        try:
            phases = json.loads(path.read_text())["phases"]
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a file of recorded losses; give one, or a run directory") from None
    if not phases:
        raise UsageError(f"{path} has no phase with losses; give a run directory that was trained")
    return phases


# ------------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class Comparison:
    """Hold how two recordings of one phase differ. Differences are relative, the largest over all steps.

    Attributes:
        first_step: The first step with a difference above the tolerance, or that only one of them has.
        scores: The difference of each final score.
        same_weights: Whether the hashes are equal; None where one of them is missing.
    """

    steps: int
    first_step: int | None
    loss: float
    grad_norm: float
    scores: dict[str, float]
    same_weights: bool | None

    def within(self, rtol: float) -> bool:
        """Return whether they are equal; with ``rtol`` 0, final weights included."""
        close = self.first_step is None and all(difference <= rtol for difference in self.scores.values())
        return close and (rtol > 0 or self.same_weights is not False)


def relative_difference(a: float, b: float) -> float:
    """Return the absolute difference over the larger absolute value: 0 for two NaNs, infinity for one."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    difference = abs(a - b) / max(abs(a), abs(b))
    return math.inf if math.isnan(difference) else difference


def compare_phases(a: Phase, b: Phase, rtol: float = 0.0) -> Comparison:
    """Compare two recordings of one phase."""
    largest = dict.fromkeys(TAGS, 0.0)
    first = next(iter(sorted(set(a["steps"]) ^ set(b["steps"]))), None)
    common = sorted(set(a["steps"]) & set(b["steps"]))
    for tag in TAGS:
        values = [dict(zip(phase["steps"], phase[tag], strict=True)) for phase in (a, b)]
        for step in common:
            difference = relative_difference(values[0][step], values[1][step])
            largest[tag] = max(largest[tag], difference)
            if difference > rtol:
                first = step if first is None else min(first, step)
    names = a["scores"].keys() | b["scores"].keys()
    scores = {name: relative_difference(*(phase["scores"].get(name, math.nan) for phase in (a, b))) for name in names}
    known = a["weights"] is not None and b["weights"] is not None
    same = a["weights"] == b["weights"] if known else None
    return Comparison(len(common), first, largest[TAGS[0]], largest[TAGS[1]], scores, same)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the losses and weights of two runs, step by step.")
    parser.add_argument("a", type=Path, help="run directory, or a recorded golden file")
    parser.add_argument("b", type=Path, help="run directory, or a recorded golden file")
    parser.add_argument("--rtol", type=float, default=0.0, help="allowed relative difference (default: same bits)")
    given = parser.parse_args(arguments)
    try:
        if not given.rtol >= 0:
            raise UsageError(f"--rtol {given.rtol}: give a number that is not negative")
        runs = [read_run(given.a), read_run(given.b)]
        shared = [name for name in runs[0] if name in runs[1]]
        if not shared:
            raise UsageError(f"{given.a} and {given.b} share no phase: {', '.join(runs[0])} and {', '.join(runs[1])}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    equal = True
    print(f"{'phase':<14}{'steps':>6}{'first':>7}{'loss':>11}{'grad norm':>11}{'scores':>11}  weights")
    for name in shared:
        found = compare_phases(runs[0][name], runs[1][name], given.rtol)
        equal &= found.within(given.rtol)
        first = "-" if found.first_step is None else str(found.first_step)
        numbers = f"{found.loss:>11.2e}{found.grad_norm:>11.2e}{max(found.scores.values(), default=0.0):>11.2e}"
        weights = {True: "equal", False: "differ", None: "-"}[found.same_weights]
        print(f"{name:<14}{found.steps:>6}{first:>7}{numbers}  {weights}")
    for path, run, other in ((given.a, *runs), (given.b, *reversed(runs))):
        if only := [name for name in run if name not in other]:
            print(f"only in {path}: {', '.join(only)}")
    print("equal" if equal else "different", f"(rtol {given.rtol:g})" if given.rtol else "(to the last bit)")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
