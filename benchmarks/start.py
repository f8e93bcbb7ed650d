"""Measure what a phase needs before its first step, as ratios to ``import torch, timm``, measured alternately.

``python benchmarks/start.py --turns 10`` prints medians and ranges of CPU seconds and peak memory of new processes: of
``import torch, timm``, of the imports of a phase, and of a phase of ``digits`` until the first step has ended.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

USED = """
import resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
print("used", used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=sys.stderr, flush=True)
"""
IMPORTS = "import bigincubate.training.run_phase, bigincubate.tasks.image_classification.task, bigincubate.data.streams"
FIRST_STEP = f"""
import os, sys
from bigincubate.cli import main
from bigincubate.training.trainer import Trainer
step = Trainer.step
def first_step(*arguments):
    step(*arguments)
    {USED.strip().replace(chr(10), chr(10) + "    ")}
    os._exit(0)
Trainer.step = first_step
sys.argv = ["bigincubate", "train", "digits", "--run-dir", sys.argv[1], "--phase", "pretrain"]
main()
"""


def measure(code: str, *arguments: str) -> tuple[float, float]:
    """Return CPU seconds and peak resident MiB of a new process."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    line = next((line for line in ended.stderr.splitlines() if line.startswith("used ")), None)
    if line is None:
        raise SystemExit(ended.stderr)
    _, seconds, mib = line.split()
    return float(seconds), float(mib)


def main() -> None:
    """Print a table with one row per program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder, "run"))
        subprocess.run([sys.executable, "-c", FIRST_STEP, run], check=True, capture_output=True)  # prepares the data
        programs = {
            "import torch, timm": ("import torch, timm" + USED, ()),
            "imports of a phase": (IMPORTS + USED, ()),
            "until the first step has ended": (FIRST_STEP, (run,)),
        }
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(turns):
            for name, (code, arguments) in programs.items():
                rows[name].append(measure(code, *arguments))
    base = rows["import torch, timm"]
    print("| program | CPU seconds | ratio | MiB | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in rows.items():
        seconds, mib = ([value[index] for value in values] for index in (0, 1))
        ratios = [[value[index] / other[index] for value, other in zip(values, base, strict=True)] for index in (0, 1)]
        shown = [f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})" for ratio in ratios]
        print(f"| {name} | {statistics.median(seconds):.2f} | {shown[0]} | {statistics.median(mib):.0f} | {shown[1]} |")


if __name__ == "__main__":
    main()
