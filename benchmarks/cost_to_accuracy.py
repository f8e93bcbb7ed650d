"""Measure accuracy against training FLOPs and seconds, for several ways of training, budgets and seeds.

    python benchmarks/cost_to_accuracy.py digits
    python benchmarks/cost_to_accuracy.py digits --budgets 1 --ways incubated fresh grow end-to-end layer-scale
    python benchmarks/cost_to_accuracy.py benchmarks/cifar20-deep.toml --set data.path=data/cifar20 --budgets 1 \
        --ways incubated decentralized end-to-end layer-scale

A budget is a fraction of the recipe's epochs, for all phases. End-to-end training always has the same FLOPs as all
phases of incubation with the same budget. Each run uses the command line and a separate folder under OUT; finished
runs are not repeated. Writes OUT/table.md, table.json, curves.png and curves.html.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from bigincubate.config import Phase, Recipe, load_recipe
from bigincubate.errors import BigincubateError, Exit
from bigincubate.storage.run_directory import RunDir
from bigincubate.tasks.metric import Metric, describe_metrics
from bigincubate.tasks.registry import task_class

PHASES: tuple[Phase, ...] = ("pretrain", "incubate", "finetune")
STOPPED = {Exit.LOCKED, Exit.PREEMPTED, Exit.INTERRUPTED}
END_TO_END = ("train", "--phase", "end_to_end")
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # the command, and the changes of the recipe
    "incubated": (("run", "--jobs", "1"), ()),
    "fresh": (("run", "--jobs", "1"), ('incubate.init="fresh"',)),
    "boundary": (("run", "--jobs", "1"), ('incubate.init="boundary"',)),
    "grow": (("run", "--jobs", "1"), ('incubate.init="grow"',)),
    "not incubated": (("run", "--jobs", "1"), ("incubate.train.max_steps=0",)),  # modules keep their initial weights
    "expanded": (("run", "--jobs", "1"), ('plan.incubate="none"',)),  # depth expansion
    "decentralized": (("run", "--jobs", "1"), ("data.decentralized=true",)),
    "end-to-end": (END_TO_END, ()),
    # end to end: with LayerScale, with residual branches scaled by depth, with mimetic initialization
    "layer-scale": (END_TO_END, ("model.args.init_values=1e-4",)),
    "scaled": (END_TO_END, ('end_to_end.init="scaled"',)),
    "mimetic": (END_TO_END, ('end_to_end.init="mimetic"',)),
}


@dataclass(frozen=True)
class Trial:
    way: str
    budget: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.way.replace(' ', '-')}-{self.budget:g}-{self.seed}"


class RunFailed(Exception):
    """A run failed. The arguments are its exit code and a message."""


def train(trial: Trial, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Run or resume a trial, and return its results.

    Raises:
        RunFailed: The command failed. It has printed why.
    """
    command, changes = WAYS[trial.way]
    folder = args.out / trial.folder
    epochs = [f"{p}.train.epochs={recipe.settings(p).train.epochs * trial.budget:g}" for p in PHASES]
    sets = [*args.sets, *epochs, f"train.seed={trial.seed}", *changes]
    done = subprocess.run(
        [sys.executable, "-m", "bigincubate", command[0], args.recipe, "--run-dir", str(folder), *command[1:]]
        + [part for value in sets for part in ("--set", value)],
        stdout=subprocess.DEVNULL,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    if done.returncode:
        # a run that was stopped resumes; for all other codes, it has printed what is wrong
        advice = "run the same command again to resume" if done.returncode in STOPPED else "its error is above"
        raise RunFailed(done.returncode, f"{folder}: exit code {done.returncode}; {advice}")
    found = RunDir(folder).update_summary()
    is_incubated = "end_to_end" not in command
    modules = [module for module in found["modules"] if module]  # without those that are not incubated
    phases = [found["meta"], *modules, found["finetune"]] if is_incubated else [found["end_to_end"]]
    on_the_way = {}
    if is_incubated:
        scores = {key: found[key]["metrics"] for key in ("meta", "assembled")}
        on_the_way = {**scores, "hybrids": [module["metrics"] for module in modules]}
    return {
        **asdict(trial),
        "metrics": phases[-1]["metrics"],
        "flops": sum(phase["flops"] for phase in phases),
        "seconds": sum(phase["seconds"] for phase in phases),
        **on_the_way,
    }


def spread(values: list[float], metric: Metric) -> str:
    """Return the mean, and the lowest and highest value if they differ."""
    mean = metric.text(statistics.mean(values))
    return mean if min(values) == max(values) else f"{mean} ({metric.text(min(values))} to {metric.text(max(values))})"


def table(trials: list[dict[str, Any]], metrics: Sequence[Metric]) -> str:
    """Return the results as a Markdown table, with only the first metric of hybrids and assembled models."""
    headline, shown = metrics[0], [metric for metric in metrics if metric.in_tables]
    worst = min if headline.higher_is_better else max
    scores = [f"{metric.column}, mean (lowest to highest)" for metric in shown]
    columns = ["way", "budget", *scores, "assembled", "lowest hybrid", "PFLOPs", "seconds"]
    rules = ["---", "---:", *["---"] * (len(scores) + 2), "---:", "---:"]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, rules)]
    groups = sorted({(trial["budget"], list(WAYS).index(trial["way"]), trial["way"]) for trial in trials})
    for budget, _, way in groups:
        group = [trial for trial in trials if (trial["way"], trial["budget"]) == (way, budget)]
        incubated = [trial for trial in group if "assembled" in trial]
        assembled = [trial["assembled"][headline.name] for trial in incubated]
        hybrids = [
            worst(scores[headline.name] for scores in trial["hybrids"]) for trial in incubated if trial["hybrids"]
        ]
        cells = [
            *(way, f"{budget:g}"),
            *(spread([trial["metrics"][metric.name] for trial in group], metric) for metric in shown),
            *(spread(values, headline) if values else "" for values in (assembled, hybrids)),
            f"{statistics.mean(trial['flops'] for trial in group) / 1e15:.3g}",
            f"{statistics.mean(trial['seconds'] for trial in group):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(trials: list[dict[str, Any]], metric: Metric, title: str, out: Path) -> None:
    """Plot a metric against FLOPs and against seconds, with one line per way of training and one dot per run."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("flops", "seconds"), ("training FLOPs", "seconds, one core"), strict=True):
        for color, way in enumerate(dict.fromkeys(trial["way"] for trial in trials)):
            mine = [trial for trial in trials if trial["way"] == way]
            budgets = sorted({trial["budget"] for trial in mine})
            points = [(trial["budget"], trial[key], trial["metrics"][metric.name]) for trial in mine]
            means = [
                [statistics.mean(point[at] for point in points if point[0] == budget) for budget in budgets]
                for at in (1, 2)
            ]
            axis.plot(*means, color=f"C{color}", marker="o", label=way)
            axis.scatter(*list(zip(*points, strict=True))[1:], color=f"C{color}", s=12, alpha=0.5)
        axis.set_xscale("log"), axis.set_xlabel(label), axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric.column), axes[0].legend(), figure.suptitle(title)
    figure.savefig(out / "curves.png", dpi=150)
    drawing = StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title>{svg[svg.index('<svg') :]}"
    (out / "curves.html").write_text(f"{page}<pre>{(out / 'table.md').read_text()}</pre>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a recipe, or a .toml file")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["incubated", "expanded", "end-to-end", "layer-scale"]
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: a folder in runs/cost-to-accuracy for the recipe and --set")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="number of runs in parallel, on one core each"
    )
    args = parser.parse_args()

    try:
        compare(load_recipe(args.recipe, args.sets), args)
    except BigincubateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except RunFailed as failure:
        code, message = failure.args
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(code) from None


def compare(recipe: Recipe, args: argparse.Namespace) -> None:
    """Run all trials, and write and print the results.

    Raises:
        RunFailed: One failed. Those that had not started by then are not run.
    """
    metrics = task_class(recipe.settings("end_to_end").task.name).metrics
    trials = [Trial(way, budget, seed) for budget, seed, way in product(args.budgets, args.seeds, args.ways)]
    if args.out is None:  # other settings get another folder, because a run directory belongs to one recipe
        digest = hashlib.sha256("\n".join(sorted(args.sets)).encode()).hexdigest()[:8]
        args.out = Path("runs/cost-to-accuracy") / (f"{recipe.name}-{digest}" if args.sets else recipe.name)
    args.out.mkdir(parents=True, exist_ok=True)
    found, failed = [], Event()

    def attempt(trial: Trial) -> dict[str, Any]:
        if failed.is_set():
            raise RunFailed(Exit.PREEMPTED, f"{trial.folder} was not started, because another run failed")
        try:
            return train(trial, recipe, args)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(attempt, trials):
            found.append(result)
            scores = describe_metrics(metrics, result["metrics"])
            print(f"{result['way']}, budget {result['budget']:g}, seed {result['seed']}: {scores}")
            sys.stdout.flush()
    (args.out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "table.md").write_text(table(found, metrics))
    draw(found, metrics[0], f"{recipe.name}: {', '.join(args.sets)}" if args.sets else recipe.name, args.out)
    print(f"\n{table(found, metrics)}\n{args.out}/curves.html")


if __name__ == "__main__":
    main()
