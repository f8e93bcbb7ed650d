"""Measure the cost of streaming, decoding and augmentation per training step, compared with batches in memory.

    python benchmarks/loader.py [--repeats 5] [--steps 22] [--out FILE]
    python benchmarks/loader.py --samples

Uses the trainer's step, at the size of the demo (`digits`: 1,437 uncompressed PNGs of 8x8 pixels; the meta model, whose
step is the shortest, a module, and all 32 blocks) and of `cifar100-mini` (generated JPEGs of 32x32 pixels). The two
alternate. A measurement has as many steps as an epoch of the digits, so it includes the cost of starting an epoch.
*overhead* is its time divided by the time with batches in memory in the same repeat, minus one. Set OMP_NUM_THREADS, as
`bigincubate run` does for parallel phases. Prints a Markdown table. With --samples, prints the cost per sample without
workers instead: the lowest of twelve epochs, with decoded images in memory and without.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from paired_timing import Contestant, serve, time_in_turns

CLASSES, EACH = 100, 80  # number of classes, and of JPEGs per class; a fifth is held out
NO_META = ["pretrain.train.max_steps=0"]  # a module needs a meta model, trained or not
JPEG = "JPEG 32x32, meta model"
CASES: dict[str, dict[str, Any]] = {
    "digits, meta model": {"recipe": "digits", "phase": "pretrain", "module": None, "sets": []},
    "digits, module 0": {"recipe": "digits", "phase": "incubate", "module": 0, "sets": NO_META},
    "digits, all blocks": {"recipe": "digits", "phase": "end_to_end", "module": None, "sets": []},
    JPEG: {
        "recipe": "cifar100-mini",
        "phase": "pretrain",
        "module": None,
        "sets": [f"data.train_samples={CLASSES * EACH * 4 // 5}"],
    },
}
IN_MEMORY = "in memory"


def make_jpegs(
    folder: Path, classes: int = CLASSES, each: int = EACH, size: tuple[int, int] = (32, 32), coarse: int = 6
) -> None:
    """Write JPEGs with smooth colors (``coarse`` per side) and some noise, of realistic file size, by class."""
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(0)
    for label in range(classes):
        (folder / f"{label}").mkdir(parents=True)
        for number in range(each):
            colors = random.randint(0, 256, (coarse, coarse, 3)).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(colors).resize(size))
            noisy = smooth + random.normal(0, 8, smooth.shape)
            out = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            (folder / f"{label}" / f"{number}.jpg").write_bytes(out.getvalue())


def trainer_of(settings: dict[str, Any], sets: list[str]) -> Any:
    """Return a trainer before its first step.

    Args:
        settings: Recipe, phase, module, data and a folder for runs.
        sets: Additional recipe keys.
    """
    from bigincubate.config import load_recipe
    from bigincubate.distributed.process_group import DistributedContext
    from bigincubate.distributed.signals import StopFlag
    from bigincubate.planning.context import open_run
    from bigincubate.storage.run_directory import RunDir
    from bigincubate.training.run_phase import train_phase
    from bigincubate.training.trainer import Trainer

    recipe = load_recipe(settings["recipe"], [*settings["sets"], f"data.path={settings['data']}", *sets])
    opened, env = open_run(recipe, RunDir(Path(tempfile.mkdtemp(dir=settings["folder"])))), DistributedContext.detect()
    if settings["module"] is not None:
        train_phase(opened.phase("pretrain", None, env))
    trainer = Trainer.build(opened.phase(settings["phase"], settings["module"], env), StopFlag())
    trainer.wrapped.train()
    return trainer


def contestant(name: str, settings: dict[str, Any]) -> Contestant:
    workers = 0 if name == IN_MEMORY else int(name.split()[0])
    trainer = trainer_of(settings, [f"data.workers={workers}"])
    stream = trainer.parts.train_stream.batches(0)
    batches = stream
    if name == IN_MEMORY:
        in_memory = list(islice(stream, settings["steps"]))
        batches = cycle(in_memory)

    def turn() -> None:
        for batch in islice(batches, settings["steps"]):
            trainer.step(batch)

    def forward() -> Any:
        return trainer.task.loss(trainer.wrapped, next(iter(batches)).to(trainer.env.device), 0)

    return Contestant(turn, forward, list(trainer.model.parameters()))


def sample_cost(data: Path, recipe: str, sets: list[str], cache_bytes: int) -> float:
    """Return the microseconds per sample with this size of the cache of decoded images."""
    from bigincubate.config import load_recipe
    from bigincubate.data import shards
    from bigincubate.data.dataset import open_dataset
    from bigincubate.tasks.registry import make_task

    shards.DECODED_CACHE_BYTES = cache_bytes
    loaded = load_recipe(recipe, [*sets, "train.batch_size=64"])
    task = make_task(loaded.settings("pretrain"), loaded.data)
    stream = task.train_stream(open_dataset(data), rank=0, world=1)
    batches, least = stream.batches(0), float("inf")
    for _ in range(13):
        start = time.perf_counter()
        for _ in islice(batches, stream.steps_per_epoch):
            pass
        least = min(least, time.perf_counter() - start)
    return least / stream.steps_per_epoch / 64 * 1e6


def print_samples(folder: Path) -> None:
    from bigincubate.data.shards import DECODED_CACHE_BYTES

    print("| sample | decoded in memory, µs | decoded each time, µs |\n| --- | ---: | ---: |")
    for recipe, kind, sets in (("digits", "PNG 8x8", []), ("cifar100-mini", "JPEG 32x32", CASES[JPEG]["sets"])):
        cached, uncached = (
            sample_cost(folder / recipe, recipe, [*sets, "data.workers=0"], size) for size in (DECODED_CACHE_BYTES, 0)
        )
        print(f"| {kind} | {cached:.0f} | {uncached:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(contestant(args.worker[0], json.loads(args.worker[1])))
    from bigincubate.data.prepare import prepare_dataset

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_dataset("digits", folder / "digits")
        make_jpegs(folder / "jpegs")
        prepare_dataset(str(folder / "jpegs"), folder / "cifar100-mini")
        if args.samples:
            return print_samples(folder)
        print("| step | workers | ms per step | in memory | overhead | lowest to highest |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for case in args.cases:
            settings = {**CASES[case], "folder": temporary, "steps": args.steps}
            settings["data"] = str(folder / settings["recipe"])
            names = [*(f"{workers} workers" for workers in args.workers), IN_MEMORY]
            found = time_in_turns(__file__, names, settings, repeats=args.repeats, steps=1)
            memory = found[IN_MEMORY]["seconds"] / args.steps * 1e3
            for name in names[:-1]:
                own = found[name]
                overhead, least, most = (1 / own[key] - 1 for key in ("speed", "most", "least"))
                row = {"case": case, "workers": name, "ms": own["seconds"] / args.steps * 1e3, "memory_ms": memory}
                rows.append({**row, "overhead": overhead, "least": least, "most": most})
                print(
                    f"| {case} | {name.split()[0]} | {row['ms']:.1f} | {memory:.1f} | **{overhead:.1%}** "
                    f"| {least:.1%} to {most:.1%} |",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
