"""Compare modules that share one loader with modules that have one loader each.

    OMP_NUM_THREADS=1 python benchmarks/co_train.py [--recipe digits] [--steps 100] [--repeats 3] [--out FILE]
    OMP_NUM_THREADS=1 python benchmarks/co_train.py --photos [--steps 40]

The two alternate. Each runs `bigincubate run RECIPE --jobs K`, with or without `--co-train`, on a copy of a run that
has data and a meta model: K modules with `--steps` steps and no warm-up, assembly, no fine-tuning steps, and the
export. The seconds are the time of the whole command, including imports and evaluations; CPU seconds are the user and
system time of all processes. *batches* counts the batches that all loaders read, decoded and augmented. Ratios are
computed per repeat. With `--photos`, the recipe is a small ViT on generated JPEGs of 500x375 pixels, which take
longer to load than to train on. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from loader import make_jpegs

from bigincubate.config import load_recipe

PHOTOS = """
[model]
name = "vit_tiny_patch16_224"
num_classes = 8
args = { patch_size = 32, embed_dim = 96, num_heads = 3 }
[plan]
target_depths = [2, 2, 2, 2]
meta_depths = [1, 1, 1, 1]
[data]
path = "FOLDER/data"
[train]
batch_size = 32
[augment]
color_jitter = 0.3
"""
PROGRAM = [sys.executable, "-m", "bigincubate"]
APART, SHARED = "one loader per module", "one loader for all"


def call(*words: object) -> None:
    ended = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit {ended.returncode}\n{ended.stdout}{ended.stderr}")


def turn(words: list[object], run: Path) -> dict[str, float]:
    """Run one command and return ``seconds``, ``cpu`` (seconds) and ``batches``."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call(*words)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = json.loads((run / "summary.json").read_text())["modules"]
    wanted = sum(module["steps"] for module in modules)  # without sharing
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    saved = sum(event["sent"] - event["made"] for event in events if event["event"] == "shared_loader")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "batches": wanted - saved}


def ratio(turns: dict[str, list[dict[str, float]]], key: str) -> tuple[float, float, float]:
    """Return the median, lowest and highest ratio of the shared loader to separate loaders over the repeats."""
    found = sorted(own[key] / theirs[key] for own, theirs in zip(turns[SHARED], turns[APART], strict=True))
    return statistics.median(found), found[0], found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    lengths = [f"{phase}.train.max_steps=0" for phase in ("pretrain", "finetune")]
    lengths += [f"incubate.train.max_steps={args.steps}", "incubate.schedule.warmup_epochs=0"]
    sets = [*lengths, *args.sets]
    flags = [word for each in sets for word in ("--set", each)]
    turns: dict[str, list[dict[str, float]]] = {APART: [], SHARED: []}
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared"
        if args.photos:
            args.recipe = str(Path(temporary) / "photos.toml")
            Path(args.recipe).write_text(PHOTOS.replace("FOLDER", temporary))
            make_jpegs(Path(temporary) / "photos", classes=8, each=40, size=(500, 375), coarse=40)
            call("data", "prepare", Path(temporary) / "photos", "--out", Path(temporary) / "data")
        modules = load_recipe(args.recipe, sets).plan.number
        call("train", args.recipe, *flags, "--run-dir", prepared, "--phase", "pretrain")
        for repeat in range(args.repeats):
            for name in [APART, SHARED][:: -1 if repeat % 2 else 1]:
                run = Path(temporary) / "run"
                shutil.copytree(prepared, run)
                more = ["--co-train"] if name == SHARED else []
                turns[name].append(turn(["run", args.recipe, *flags, "--run-dir", run, "--jobs", modules, *more], run))
                shutil.rmtree(run)
    rows: list[dict[str, Any]] = []
    print(f"| {modules} modules, {args.steps} steps | {APART} | {SHARED} | ratio | lowest to highest |")
    print("| --- | ---: | ---: | ---: | --- |")
    for key, label in (("batches", "batches made"), ("cpu", "CPU seconds"), ("seconds", "seconds")):
        theirs, own = (statistics.median(each[key] for each in turns[name]) for name in (APART, SHARED))
        middle, least, most = ratio(turns, key)
        rows.append({"what": key, APART: theirs, SHARED: own, "ratio": middle, "least": least, "most": most})
        print(f"| {label} | {theirs:,.0f} | {own:,.0f} | **{middle:.2f}** | {least:.2f} to {most:.2f} |")
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
