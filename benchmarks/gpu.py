"""Run all benchmarks for one GPU in minutes, for the tables of docs/gpu.md.

    python benchmarks/gpu.py --minutes 8 --out results/gpu [--reference CHECKOUT] [--only NAME ...]
    python benchmarks/gpu.py --out /tmp/toy --device cpu --toy

The most important rows come first; each is written to OUT/rows.jsonl and OUT/gpu.md as soon as it is measured. When the
time is over, no further row is started. With the same --out, the command measures missing rows and repeats failed ones.
CHECKOUT is a checkout of github.com/LeapLabTHU/Deep-Incubation. Contestants alternate; ratios are medians over the
repeats, with the lowest and the highest. MFU counts the FLOPs of a step that skips nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from gpu_rows import ROWS, BenchmarkRow, Request, Sizes

from bigincubate.files import append_json_line, read_json_lines, write_text

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 200  # seconds after which a row is stopped and recorded as failed


def measure_row(row: BenchmarkRow, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Measure a row in a separate process, which is killed with its children after ``limit`` seconds."""
    words = [sys.executable, __file__, "--row", row.name, "--out", str(args.out.resolve())]
    words += ["--reference", str(args.reference.resolve())] if args.reference else []
    words += ["--toy"] if args.toy else []
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    environment = {**os.environ, **hidden, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log, start = args.out / "logs" / f"{row.name}.log", time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=limit)
            problem = f"exit {process.returncode}" if process.returncode else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            problem = f"not done after {limit:.0f} s"
    found: dict[str, Any] = {"row": row.name, "table": row.table, "seconds": round(time.perf_counter() - start, 1)}
    if problem:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        return {**found, "error": f"{problem}: {''.join(last)}"}
    return {**found, **json.loads(out.splitlines()[-1])}


def print_row(name: str, request: Request) -> None:
    """Measure a row in this process, and print it as the last line."""
    out, sys.stdout = sys.stdout, sys.stderr  # so that the output of libraries goes to stderr
    lines = next(row for row in ROWS if row.name == name).measure(request)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    device += " at toy size (times are meaningless)" * request.sizes.toy
    print(json.dumps({"device": device, "torch": torch.__version__, "lines": lines}), file=out, flush=True)


def text_of(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("MFU", "waiting", "share of copy"):
        return f"{value:.1%}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def markdown(found: list[dict[str, Any]]) -> str:
    """Return one table for each kind of row, and a list of failed rows."""
    devices = sorted({f"{row['device']}, torch {row['torch']}" for row in found if "lines" in row})
    parts = [f"Measured on {'; '.join(devices)}." if devices else "Not measured yet."]
    for table in dict.fromkeys(row.table for row in ROWS):
        lines = [line for row in found if row["table"] == table for line in row.get("lines", ())]
        if lines:
            columns = list(dict.fromkeys(column for line in lines for column in line))
            rule = ["---" if any(isinstance(line.get(c), str) for line in lines) else "---:" for c in columns]
            cells = [[text_of(column, line.get(column)) for column in columns] for line in lines]
            parts.append(f"## {table}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *cells]))
    failed = [f"- `{row['row']}`: {row['error']}" for row in found if "error" in row]
    return "\n\n".join([*parts, *(["## Failed\n\n" + "\n".join(failed)] if failed else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which no row is started")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to test the benchmark itself")
    parser.add_argument("--reference", type=Path, default=None, help="a checkout of the official code")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", default=None)
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--row", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(row.name for row in ROWS))
        return
    if args.reference and not (args.reference / "engine.py").is_file():
        parser.error(
            f"{args.reference} is not a checkout of github.com/LeapLabTHU/Deep-Incubation: it has no engine.py"
        )
    if args.row:
        sizes = Sizes(toy=True, steps=1, repeats=2) if args.toy else Sizes()
        print_row(args.row, Request(sizes, args.out, args.reference))
        return

    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "rows.jsonl"
    known = {row["row"]: row for row in read_json_lines(file)}  # the last attempt at a row counts
    by_name = {row.name: row for row in ROWS}
    wanted = [by_name[name] for name in args.only] if args.only else [row for row in ROWS if row.fits(args.reference)]
    for row in wanted:
        if "lines" in known.get(row.name, ()):
            continue
        if (left := end - time.monotonic()) <= 0:
            print(f"{args.minutes:g} minutes are over; run the same command again to resume with {row.name}")
            break
        found = known[row.name] = measure_row(row, args, min(LIMIT, left + 60))
        append_json_line(file, found)
        order = [known[each.name] for each in ROWS if each.name in known]
        write_text(args.out / "gpu.md", markdown(order))
        print(f"{row.name}: {found['seconds']:.0f} s", found.get("error", ""), flush=True)
        for line in found.get("lines", ()):
            print("  " + ", ".join(f"{column} {text_of(column, value)}" for column, value in line.items()), flush=True)
    print(f"\n{args.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
