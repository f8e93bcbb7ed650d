"""A module's step with what reaches it computed once, against the same step from images, in turns.

    OMP_NUM_THREADS=1 python benchmarks/prefix_cache.py [--cases …] [--repeats 5] [--steps 8] [--out FILE]

The trainer's own step, loading included. *digits*: module k of the demo, its augmentation fixed (`augment.views = 1`).
*ViT-B/16*: module 3, three blocks behind three of the meta model, 224x224 pixels, batch 8, JPEGs made up here. Besides
the milliseconds it prints what is to be expected by FLOPs alone, the time that the rows took, for how many images
(validation included), and their size. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from duel import Contestant, duel, serve
from loader import NO_META, make_jpegs, trainer_of

FIXED = ["incubate.augment.views=1", "incubate.mixup.prob=0.0", *NO_META]
CLASSES = 8
VIT_B = ["train.batch_size=8", "train.micro_batch=8", f"model.num_classes={CLASSES}", "data.train_samples=128"]
VIT_B += ["data.workers=0", "drop_path.rates=target"]
CASES: dict[str, dict[str, Any]] = {
    **{f"digits, module {k}": {"recipe": "digits", "module": k, "sets": FIXED} for k in (1, 2, 3)},
    "ViT-B/16, module 3": {"recipe": "imagenet-vit-b", "module": 3, "sets": [*FIXED, *VIT_B]},
}
PLAIN, CACHED = "from images", "from rows"


def contestant(name: str, settings: dict[str, Any]) -> Contestant:
    trainer = trainer_of(settings, [f"incubate.prefix_cache={'true' if name == CACHED else 'false'}"])
    batches = trainer.stream.batches(0)
    if name == CACHED:  # for the table
        event = json.loads((trainer.run_dir.path / "events.jsonl").read_text().splitlines()[-1])
        about = {**event, "making": trainer.state.seconds, "flops": trainer.planned.cost.training_flops}
        Path(settings["folder"], "rows.json").write_text(json.dumps(about))
    else:
        Path(settings["folder"], "plain.json").write_text(json.dumps(trainer.planned.cost.training_flops))

    def turn() -> None:
        for batch in islice(batches, settings["steps"]):
            trainer.step(batch)

    def forward() -> Any:
        images, targets = trainer.task.prepare(next(batches).to(trainer.env.device), 0)
        return trainer.task.loss(trainer.wrapped, images, targets)

    return Contestant(turn, forward, list(trainer.model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return serve(contestant(asked.worker[0], json.loads(asked.worker[1])))
    from bigincubate.data.prepare import prepare

    rows: list[dict[str, Any]] = []
    print("| step | ms | from images | times as fast | least to most | by FLOPs | rows, s | images | MiB |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare("digits", folder / "digits")
        make_jpegs(folder / "jpegs", classes=CLASSES, each=20, size=(320, 240), coarse=20)
        prepare(str(folder / "jpegs"), folder / "imagenet-vit-b")
        for case in asked.cases:
            settings = {**CASES[case], "phase": "incubate", "folder": temporary, "steps": asked.steps}
            settings["data"] = str(folder / settings["recipe"])
            found = duel(__file__, [CACHED, PLAIN], settings, repeats=asked.repeats, steps=1)
            about, flops = (json.loads((folder / name).read_text()) for name in ("rows.json", "plain.json"))
            own, theirs = (found[name]["seconds"] / asked.steps * 1e3 for name in (CACHED, PLAIN))
            by_flops, speed = flops / about["flops"], found[CACHED]
            rows.append({"case": case, "ms": own, "from_images_ms": theirs, **speed, "by_flops": by_flops, **about})
            print(
                f"| {case} | {own:.1f} | {theirs:.1f} | **{speed['speed']:.2f}** | {speed['least']:.2f} to "
                f"{speed['most']:.2f} | {by_flops:.2f} | {about['making']:.1f} | {about['rows']:,} "
                f"| {about['bytes'] / 2**20:.1f} |",
                flush=True,
            )
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
