"""Compare the fused cross entropy of mixup's targets (two classes and a weight) with that of dense targets.

    python benchmarks/fused_loss.py [--rows 256] [--classes 1000 21841] [--repeats 5] [--out FILE]

Times forward and backward passes for given logits; the two alternate. The dense targets are created each time, as in
training. On a GPU, the Triton kernel is compared with the dense loss compiled by inductor; on a CPU, both are eager
torch. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

import torch
from torch import Tensor
from torch.nn import functional as F

from bigincubate.experimental.fused_loss import soft_cross_entropy
from bigincubate.tasks.image_classification.mixup import TwoHot

SMOOTHING = 0.1


def dense(logits: Tensor, targets: TwoHot) -> Tensor:
    return F.cross_entropy(logits.float(), targets.dense(logits.shape[1], SMOOTHING))


def pairs(logits: Tensor, targets: TwoHot) -> Tensor:
    share = torch.full((len(logits),), targets.share, device=logits.device)
    return soft_cross_entropy(logits, targets.labels, targets.partners, share, SMOOTHING).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 21841])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    against = torch.compile(dense) if device == "cuda" else dense
    rows = []
    print("| logits | classes | dense targets, ms | two classes, ms | times as fast | lowest to highest |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for classes in args.classes:
            logits = torch.randn(args.rows, classes, device=device, dtype=dtype, requires_grad=True)
            labels = torch.randint(classes, (args.rows,), device=device)
            targets = TwoHot(labels, labels.roll(args.rows // 2), 0.3)
            times: dict[str, list[float]] = {"dense": [], "pairs": []}
            for _ in range(args.repeats + 1):  # the first is a warm-up
                for name, act in (("dense", against), ("pairs", pairs)):
                    start = time.perf_counter()
                    for _ in range(args.steps):
                        logits.grad = None
                        act(logits, targets).backward()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times[name].append((time.perf_counter() - start) / args.steps * 1e3)
            speed = sorted(slow / fast for slow, fast in zip(times["dense"][1:], times["pairs"][1:], strict=True))
            row = {"dtype": str(dtype).removeprefix("torch."), "classes": classes, "speed": statistics.median(speed)}
            row |= {name: statistics.median(found[1:]) for name, found in times.items()}
            rows.append(row)
            print(
                f"| {row['dtype']} | {classes:,} | {row['dense']:.2f} | {row['pairs']:.2f} | **{row['speed']:.2f}** "
                f"| {speed[0]:.2f} to {speed[-1]:.2f} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
