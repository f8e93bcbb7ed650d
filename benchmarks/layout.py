"""Compare the training step of a model and its images in `torch.channels_last` with the contiguous format.

    python benchmarks/layout.py [--models NAME ...] [--batch 4] [--size 224] [--repeats 8]

Times eager forward and backward passes with the same weights and images; the two alternate. The ratio compares the
lowest times of both; *lowest to highest* is the range of the ratios of each repeat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch

MODELS = ["convnext_atto", "convnext_tiny", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def stepper(name: str, batch: int, size: int, precision: str, layout: torch.memory_format) -> Callable[[], None]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(name, num_classes=100).train().to(device, memory_format=layout)
    images = torch.randn(batch, 3, size, size).to(device, memory_format=layout)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    for name, default in {"batch": 4, "size": 224, "repeats": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print("| model | precision | contiguous, s | channels last, s | times as fast | lowest to highest |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for name in args.models:
        for precision in ("fp32", "bf16"):
            steps = [
                stepper(name, args.batch, args.size, precision, layout)
                for layout in (torch.contiguous_format, torch.channels_last)
            ]
            times: list[list[float]] = [[], []]
            for repeat in range(args.repeats + 1):
                for which in (0, 1) if repeat % 2 else (1, 0):
                    start = time.perf_counter()
                    steps[which]()
                    times[which].append(time.perf_counter() - start)
            plain, last = times[0][1:], times[1][1:]  # the first is a warm-up
            ratios = sorted(own / other for own, other in zip(plain, last, strict=True))
            print(
                f"| {name} | {precision} | {min(plain):.3f} | {min(last):.3f} | **{min(plain) / min(last):.2f}** "
                f"| {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
