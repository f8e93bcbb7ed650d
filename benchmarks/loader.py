"""What streaming, decoding and augmentation cost a training step, against the same batches in memory, in turns.

    python benchmarks/loader.py [--repeats 5] [--steps 22] [--out FILE]
    python benchmarks/loader.py --samples

The trainer's own step, at the size of the demo (`digits`: 1,437 uncompressed PNGs of 8x8 pixels; the meta model, whose
step is the shortest, a module, and all 32 blocks) and of `cifar100-mini` (JPEGs of 32x32 pixels, made up here). A turn
is as many steps as an epoch of the digits has, so what the start of an epoch costs is in it. *overhead* is the time of
a turn over that of the turn in memory of the same repeat, less one. Threads: set OMP_NUM_THREADS, as `bigincubate run`
does for phases beside each other. Prints a Markdown table. With --samples, one of what a sample costs without workers:
the least of twelve epochs, from images that are held decoded, and from images that are not.
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

CLASSES, EACH = 100, 80  # of the JPEGs; a fifth is held out
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
    """Smooth colours (``coarse`` places a side) and some noise, as large as photographs' files, a folder a class."""
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(0)
    for label in range(classes):
        (folder / f"{label}").mkdir(parents=True)
        for number in range(each):
            colours = random.randint(0, 256, (coarse, coarse, 3)).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(colours).resize(size))
            noisy = smooth + random.normal(0, 8, smooth.shape)
            out = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            (folder / f"{label}" / f"{number}.jpg").write_bytes(out.getvalue())


def trainer_of(settings: dict[str, Any], sets: list[str]) -> Any:
    """A trainer before its first step: a recipe, a phase, a module, data and a folder for runs; and further keys."""
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
        held = list(islice(stream, settings["steps"]))
        batches = cycle(held)  # type: ignore[assignment]

    def turn() -> None:
        for batch in islice(batches, settings["steps"]):
            trainer.step(batch)

    def forward() -> Any:
        return trainer.task.loss(trainer.wrapped, next(iter(batches)).to(trainer.env.device), 0)

    return Contestant(turn, forward, list(trainer.model.parameters()))


def sample_cost(data: Path, recipe: str, sets: list[str], room: int) -> float:
    """Microseconds."""
    from bigincubate.config import load_recipe
    from bigincubate.data import shards
    from bigincubate.data.dataset import open_dataset
    from bigincubate.tasks.registry import make_task

    shards.DECODED_CACHE_BYTES = room
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

    print("| sample | held decoded, µs | decoded anew, µs |\n| --- | ---: | ---: |")
    for recipe, kind, sets in (("digits", "PNG 8x8", []), ("cifar100-mini", "JPEG 32x32", CASES[JPEG]["sets"])):
        held, anew = (
            sample_cost(folder / recipe, recipe, [*sets, "data.workers=0"], room) for room in (DECODED_CACHE_BYTES, 0)
        )
        print(f"| {kind} | {held:.0f} | {anew:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return serve(contestant(asked.worker[0], json.loads(asked.worker[1])))
    from bigincubate.data.prepare import prepare_dataset

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_dataset("digits", folder / "digits")
        make_jpegs(folder / "jpegs")
        prepare_dataset(str(folder / "jpegs"), folder / "cifar100-mini")
        if asked.samples:
            return print_samples(folder)
        print("| step | workers | ms a step | in memory | overhead | least to most |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for case in asked.cases:
            settings = {**CASES[case], "folder": temporary, "steps": asked.steps}
            settings["data"] = str(folder / settings["recipe"])
            names = [*(f"{workers} workers" for workers in asked.workers), IN_MEMORY]
            found = time_in_turns(__file__, names, settings, repeats=asked.repeats, steps=1)
            memory = found[IN_MEMORY]["seconds"] / asked.steps * 1e3
            for name in names[:-1]:
                own = found[name]
                overhead, least, most = (1 / own[key] - 1 for key in ("speed", "most", "least"))
                row = {"case": case, "workers": name, "ms": own["seconds"] / asked.steps * 1e3, "memory_ms": memory}
                rows.append({**row, "overhead": overhead, "least": least, "most": most})
                print(
                    f"| {case} | {name.split()[0]} | {row['ms']:.1f} | {memory:.1f} | **{overhead:.1%}** "
                    f"| {least:.1%} to {most:.1%} |",
                    flush=True,
                )
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
