"""Compare augmentation on the host with augmentation in two halves, on the host and on the device.

    python benchmarks/device_augment.py [--batch 64] [--repeats 5] [--out FILE]

Both start with JPEG files in memory and end with a mixed float32 batch on the device, in one process, and alternate. In
the host half, the host decodes and resizes the images and draws parameters; the device does the rest. *both halves*
includes the transfer. *host half* is the work that remains for a loader worker if the device works in parallel, and the
reduction is the time of *host* divided by that of *host half*. Without a GPU, the device is the same CPU. Set
OMP_NUM_THREADS to limit threads. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

import numpy as np
import torch
from PIL import Image

from bigincubate.config import AugmentConfig, MixupConfig
from bigincubate.data.images import decode_image
from bigincubate.data.rng import seeded_rng
from bigincubate.experimental.device_augment import DeviceAugment
from bigincubate.tasks.image_classification.augment import train_transform
from bigincubate.tasks.image_classification.mixup import blend

DEIT = {"crop": "random_resized", "flip": 0.5, "color_jitter": 0.3, "erase": 0.25}
DEIT_3 = {"crop": "simple", "flip": 0.5, "three_augment": True, "color_jitter": 0.3}
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {  # augmentation, image size, size of the JPEGs
    "224, 3-Augment, jitter": (DEIT_3, 224, (500, 375)),
    "224, resized crop, jitter, erasing": (DEIT, 224, (500, 375)),
    "32, 3-Augment, jitter": (DEIT_3, 32, (32, 32)),
    "32, shift, flip": ({"crop": "pad"}, 32, (32, 32)),
}
MIXUP = MixupConfig(mixup=0.8, cutmix=1.0)


def jpegs(count: int, size: tuple[int, int]) -> list[bytes]:
    """Return JPEG files with smooth colors and some noise."""
    random, made = np.random.RandomState(0), []
    for _ in range(count):
        smooth = Image.fromarray(random.randint(0, 256, (8, 8, 3)).astype(np.uint8)).resize(size)
        noisy = np.asarray(smooth) + random.normal(0, 8, (size[1], size[0], 3))
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def views(transform: Callable[[Image.Image], Any], files: list[bytes]) -> list[Any]:
    made = []
    for at, file in enumerate(files):
        with seeded_rng(0, at):
            made.append(transform(decode_image(file)))
    return made


def turns(
    augment: AugmentConfig, size: int, files: list[bytes], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds per batch of each repeat, for ``host``, ``halves``, ``host half`` and ``device half``."""
    whole, half = train_transform(augment, size), DeviceAugment(augment, size)
    labels = torch.arange(len(files), device=device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def host(step: int) -> dict[str, float]:
        start = time.perf_counter()
        images = torch.stack(views(whole, files)).to(device)
        images, _ = blend(images, labels, mixup=MIXUP, seed=0, step=step)
        return {"host": now() - start}

    def halves(step: int) -> dict[str, float]:
        start = time.perf_counter()
        images, parameters = (torch.stack(column) for column in zip(*views(half, files), strict=True))
        between = time.perf_counter()
        images, _ = half.finish_and_mix(
            images.to(device), parameters.to(device), labels, mixup=MIXUP, seed=0, step=step
        )
        end = now()
        return {"halves": end - start, "host half": between - start, "device half": end - between}

    found: dict[str, list[float]] = {}
    ways = [host, halves]
    for repeat in range(repeats + 1):  # the first is a warm-up
        for way in ways[:: 1 if repeat % 2 else -1]:
            for name, seconds in way(repeat).items():
                found.setdefault(name, []).append(seconds)
    return {name: seconds[1:] for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    print(f"Images per second, batches of {args.batch}, device: {device.type}\n")
    print("| what | host | both halves | host half | device half | host work reduced by | lowest to highest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for case, (policy, size, shape) in CASES.items():
        seconds = turns(AugmentConfig(**policy), size, jpegs(args.batch, shape), device, args.repeats)
        rate = {name: args.batch / statistics.median(found) for name, found in seconds.items()}
        less = sorted(own / half for own, half in zip(seconds["host"], seconds["host half"], strict=True))
        rows.append({"case": case, **rate, "less": statistics.median(less), "least": less[0], "most": less[-1]})
        print(
            f"| {case} | {rate['host']:,.0f} | {rate['halves']:,.0f} | {rate['host half']:,.0f} "
            f"| {rate['device half']:,.0f} | **{statistics.median(less):.2f}** | {less[0]:.2f} to {less[-1]:.2f} |",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
