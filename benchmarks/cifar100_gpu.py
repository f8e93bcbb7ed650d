"""Train CIFAR-100 on one GPU in minutes: incubated, end to end, and expanded, at equal training FLOPs.

    python benchmarks/cifar100_gpu.py --data TREE --minutes 8 --out results/cifar100 [--scale 0.1] [--set KEY=VALUE]

TREE has one folder per class, or such folders in `train` and `test`. The recipe is `cifar100-deit-t32` with its epochs,
including warm-up, multiplied by --scale. *incubated* is the recipe. *end to end* uses the FLOPs of all its phases for
end-to-end training. *expanded* initializes the modules with the blocks of the meta model (`incubate.init = "grow"`),
skips incubation and adds its FLOPs to fine-tuning. Each of them is a run of the command line in a separate folder. When
the time is over, it is stopped with a checkpoint; run the same command again to resume. GPU-seconds are the sum of the
training times of all phases. Prints each result as it finishes; writes OUT/table.md and OUT/table.json.
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

from bigincubate.config import PHASES, load_recipe
from bigincubate.errors import Exit
from bigincubate.files import write_text
from bigincubate.storage.run_directory import RunDir

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "cifar100-deit-t32"
TOY = ["plan.target_depths=[2,2,2,2]", "train.batch_size=8", "data.workers=0", 'train.precision="fp32"']
WAYS: dict[str, tuple[str, ...]] = {
    "incubated": ("run", "--jobs", "1"),
    "end to end": ("train", "--phase", "end_to_end"),
    "expanded": ("run", "--jobs", "1"),
}


def scaled(sets: list[str], scale: float) -> list[str]:
    """Return the settings that make every phase of the recipe shorter."""
    recipe, changed = load_recipe(RECIPE, sets), ['end_to_end.budget="equal_flops"']
    for phase in PHASES:
        settings = recipe.settings(phase)
        changed.append(f"{phase}.train.epochs={settings.train.epochs * scale:g}")
        changed.append(f"{phase}.schedule.warmup_epochs={settings.schedule.warmup_epochs * scale:g}")
    return changed


def expanded(sets: list[str]) -> list[str]:
    """Return the settings that skip incubation and add its FLOPs to fine-tuning."""
    from bigincubate.planning.cost import cost_plan
    from bigincubate.planning.phases import make_plan
    from bigincubate.planning.prepare_run import expected_samples

    recipe = load_recipe(RECIPE, sets)
    samples = expected_samples(recipe)
    rows = cost_plan(recipe, make_plan(recipe), samples)
    fine = next(row for row in rows if row.phase == "finetune")
    given = sum(row.total_flops for row in rows if row.phase == "incubate")
    epochs = fine.epochs * (1 + given / fine.total_flops)
    return ['incubate.init="grow"', "incubate.train.max_steps=0", f"finetune.train.epochs={epochs:g}"]


def call(words: list[str], environment: dict[str, str], log: Path, end: float) -> int:
    """Run the command line until it ends, or stop it with a checkpoint. Return its exit code."""
    with log.open("a") as file:
        command = [sys.executable, "-m", "bigincubate", *words]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def collect(way: str, run: RunDir) -> dict[str, Any]:
    """Return the results of a finished run."""
    found = run.update_summary()
    phases = [found["end_to_end"]] if way == "end to end" else [found["meta"], *found["modules"], found["finetune"]]
    result = {"way": way, **{f"final {name}": value for name, value in phases[-1]["metrics"].items()}}
    if way != "end to end":
        result |= {
            "meta top1": found["meta"]["metrics"]["top1"],
            "assembled top1": found["assembled"]["metrics"]["top1"],
        }
    flops, seconds = (sum(phase[key] for phase in phases) for key in ("flops", "seconds"))
    return {**result, "PFLOPs": flops / 1e15, "GPU-seconds": seconds, "steps": sum(phase["steps"] for phase in phases)}


def text_of(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(results: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for result in results for column in result))
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for result in results:
        values = [result.get(column, "") for column in columns]
        lines.append([text_of(value) for value in values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a tree of images, with one folder per class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--scale", type=float, default=0.1, help="factor for the recipe's 300, 100 and 100 epochs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="two blocks per module, to test the benchmark itself")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    data, log = args.out / "data", args.out / "log.txt"
    if not (data / "dataset.json").exists():
        words = ["data", "prepare", str(args.data), "--out", str(data), "--jobs", str(os.cpu_count() or 1)]
        if code := call(words, environment, log, end):
            raise SystemExit(f"exit {code}: see {log}")
    from bigincubate.data.dataset import open_dataset

    info = open_dataset(data)
    sets = [f"data.path={data.resolve()}", f"data.train_samples={info.epoch}", "data.workers=14"]
    sets += [f"model.num_classes={len(info.schema.metadata['classes'])}", "checkpoint.every_steps=200"]
    sets += [*(TOY if args.toy else []), *args.sets]
    sets += scaled(sets, args.scale)
    results: list[dict[str, Any]] = []
    for way in args.ways:
        run, (command, *more) = RunDir(args.out / way.replace(" ", "-")), WAYS[way]
        own = [*sets, *(expanded(sets) if way == "expanded" else [])]
        flags = [word for value in own for word in ("--set", value)]
        code = call([command, RECIPE, "--run-dir", str(run.path), *more, *flags], environment, log, end)
        if code in (Exit.PREEMPTED, -signal.SIGTERM):  # the latter if it was stopped during startup
            print(f"{args.minutes:g} minutes are over in *{way}*; run the same command again to resume")
            break
        if code:
            raise SystemExit(f"{way}: exit {code}, see {log}")
        results.append(collect(way, run))
        write_text(args.out / "table.json", json.dumps(results, indent=1) + "\n")
        write_text(args.out / "table.md", table(results))
        print(", ".join(f"{key} {text_of(value)}" for key, value in results[-1].items()), flush=True)
    if results:
        print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
