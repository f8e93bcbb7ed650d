"""Time the first step of compiled blocks with an empty compile cache, and with the cache of earlier modules.

    python benchmarks/compile_cache.py [--model vit_tiny_patch16_224] [--repeats 3] [--out FILE]

The cache is inductor's, in the folder TORCHINDUCTOR_CACHE_DIR (by default one folder per user in /tmp, which all jobs
on a node share). Every first step runs in a new process: with an empty cache, and with a cache that modules 0, 1 and
2 fill one after another. Module 1 has two graphs that module 0 does not have: for the frozen blocks before it, and
for its first block, which propagates no gradient. Module 2 has the graphs of module 1. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere


TASKS = (1, 2)  # modules


def first_step(settings: dict[str, Any], module: int) -> float:
    """Return the seconds of the first step in this process."""
    from phase_step import ours

    contestant = ours(settings, "incubate", module, skip=False, compiled=True)
    start = time.perf_counter()
    contestant.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from phase_step import DEFAULTS

    settings = {**DEFAULTS, "model": args.model, "batch": args.batch, "drop_path": 0.1}
    if args.worker is not None:
        return print(first_step(settings, args.worker))

    def seconds(module: int, folder: str) -> float:
        command = [sys.executable, __file__, "--worker", str(module)]
        command += ["--model", args.model, "--batch", str(args.batch)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        return float(out.split()[-1])

    cold: dict[int, list[float]] = {module: [] for module in TASKS}  # by repeat
    warm: dict[int, list[float]] = {module: [] for module in TASKS}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as shared:
            seconds(0, shared)
            for module in TASKS:
                with tempfile.TemporaryDirectory() as empty:
                    cold[module].append(seconds(module, empty))
                warm[module].append(seconds(module, shared))
    rows = []
    print("| task | empty caches, s | caches of the tasks before, s | ratio | lowest to highest |")
    print("| --- | ---: | ---: | ---: | --- |")
    for module in TASKS:
        shares = sorted(one / other for one, other in zip(warm[module], cold[module], strict=True))
        row = [statistics.median(values) for values in (cold[module], warm[module], shares)]
        rows.append(dict(zip(("module", "cold", "warm", "share"), (module, *row), strict=True)))
        spread = f"{shares[0]:.2f} to {shares[-1]:.2f}"
        print(f"| module {module} | {row[0]:.1f} | {row[1]:.1f} | **{row[2]:.2f}** | {spread} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
