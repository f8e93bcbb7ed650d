"""The first step of compiled blocks with empty compile caches, and then with what that left, each in a new process.

    python benchmarks/compile_cache.py [--model vit_tiny_patch16_224] [--repeats 3] [--out FILE]

The caches are inductor's, in the folder that TORCHINDUCTOR_CACHE_DIR names (by default one a user in /tmp, which all
jobs on a node share); here a new one for each repeat. Array tasks come one after another: module 0 finds nothing;
module 1 has, beside the graphs of module 0, one for frozen blocks before it; module 2 has those of module 1. Prints a
Markdown table.
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


def first_step(settings: dict[str, Any], module: int) -> float:
    """Seconds, in this process."""
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
    asked = parser.parse_args()
    from phase_step import DEFAULTS

    settings = {**DEFAULTS, "model": asked.model, "batch": asked.batch, "drop_path": 0.1}
    if asked.worker is not None:
        return print(first_step(settings, asked.worker))
    times: list[list[float]] = []  # of each repeat, by module
    for _ in range(asked.repeats):
        with tempfile.TemporaryDirectory() as folder:
            times.append([])
            for module in range(3):
                command = [sys.executable, __file__, "--worker", str(module)]
                command += ["--model", asked.model, "--batch", str(asked.batch)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                times[-1].append(float(out.split()[-1]))
    rows = []
    print("| task | first step, s | over the cold one | least to most |\n| --- | ---: | ---: | --- |")
    for module, title in enumerate(["module 0, cold", "module 1, after it", "module 2, after both"]):
        shares = sorted(repeat[module] / repeat[0] for repeat in times)
        seconds, share = statistics.median(repeat[module] for repeat in times), statistics.median(shares)
        rows.append({"task": title, "seconds": seconds, "share": share})
        print(f"| {title} | {seconds:.1f} | **{share:.2f}** | {shares[0]:.2f} to {shares[-1]:.2f} |")
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
