"""What incubation is worth on the digits: three seeds of the demo, of its control and of its end-to-end baseline.

    python benchmarks/digits.py [--out runs/bench-digits] [--seeds 0 1 2] [--jobs 2]

*incubated* is the demo itself; *control* is the demo without incubation (each module as it is initialised, the same
fine-tuning); *end to end* is the same model trained from scratch with the FLOPs of the whole incubation. Runs that are
done are not done again. Prints a Markdown table and writes OUT/table.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(out: Path, name: str, seed: int, jobs: int, *options: str) -> dict[str, Any]:
    folder = out / f"{name}-{seed}"
    command = [sys.executable, "-m", "bigincubate", "run", "digits", "--run-dir", str(folder), "--jobs", str(jobs)]
    subprocess.run([*command, "--set", f"train.seed={seed}", *options], check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    rows = []
    print("| seed | meta | hybrids | assembled | fine-tuned | control | end to end | fine-tuning's share | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for seed in options.seeds:
        full = run(options.out, "incubated", seed, options.jobs, "--baseline")
        control = run(options.out, "control", seed, options.jobs, "--set", "incubate.train.max_steps=0")
        phases = [full["meta"], *full["modules"], full["finetune"]]
        row = {
            "seed": seed,
            "meta": full["meta"]["top1"],
            "hybrids": [module["top1"] for module in full["modules"]],
            "assembled": full["assembled"]["top1"],
            "finetuned": full["finetune"]["top1"],
            "control": control["finetune"]["top1"],
            "end_to_end": full["end_to_end"]["top1"],
            "finetune_share": full["finetune"]["flops"] / sum(phase["flops"] for phase in phases),
            "seconds": sum(phase["seconds"] for phase in phases),
        }
        rows.append(row)
        hybrids = " ".join(f"{value:.1f}" for value in row["hybrids"])
        print(
            f"| {seed} | {row['meta']:.1f} | {hybrids} | {row['assembled']:.1f} | **{row['finetuned']:.2f}** |"
            f" {row['control']:.2f} | {row['end_to_end']:.2f} | {row['finetune_share']:.1%} | {row['seconds']:.0f} |",
            flush=True,
        )
    for key in ("finetuned", "control", "end_to_end"):
        values = [row[key] for row in rows]
        print(f"\n{key}: mean {statistics.mean(values):.2f}, from {min(values):.2f} to {max(values):.2f}")
    (options.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
